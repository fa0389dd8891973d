package hostfile

import (
	"reflect"
	"strconv"
	"strings"

	"viaduct/sriov"
)

// Schema is the JSON Schema (2020-12) of a file, for editors, made from the types it is read into.
func Schema() map[string]any {
	s := schemaOf(reflect.TypeFor[Host](), nil)
	s["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	s["title"] = "viaduct: the declared host"
	return s
}

func schemaOf(t reflect.Type, f *reflect.StructField) map[string]any {
	out := map[string]any{}
	if f != nil && f.Tag.Get("doc") != "" {
		out["description"] = f.Tag.Get("doc")
	}
	switch {
	case t == reflect.TypeFor[Range]():
		out["type"] = []string{"string", "integer"}
	case reflect.PointerTo(t).Implements(reflect.TypeFor[scalar]()):
		out["type"] = "string"
	case t.Kind() == reflect.Struct:
		if field, ok := onlyScalar(t); ok {
			return schemaOf(field.Type, f)
		}
		properties, required := map[string]any{}, []string{}
		var either []map[string]any
		for field := range t.Fields() {
			name := field.Tag.Get("yaml")
			switch name {
			case "-":
				continue
			case ",settings":
				for _, k := range sriov.Keys() {
					properties[string(k)] = map[string]any{
						"type":        []string{"string", "integer"},
						"description": settingDoc(k),
					}
				}
				continue
			}
			properties[name] = schemaOf(field.Type, &field)
			if field.Tag.Get("required") != "" {
				required = append(required, name)
			}
			if field.Tag.Get("either") != "" {
				either = append(either, map[string]any{"required": []string{name}})
			}
		}

		out["type"], out["properties"], out["additionalProperties"] = "object", properties, false
		if len(required) > 0 {
			out["required"] = required
		}
		if len(either) > 0 {
			out["oneOf"] = either
		}
	case t == reflect.TypeFor[Matches]():
		list := map[string]any{"type": "array", "items": schemaOf(t.Elem(), nil)}
		out["oneOf"] = []any{schemaOf(t.Elem(), nil), list}
	case t.Kind() == reflect.Slice:
		out["type"], out["items"] = "array", schemaOf(t.Elem(), nil)
	case t.Kind() == reflect.Bool:
		out["type"] = "boolean"
	case t.Kind() == reflect.Int:
		out["type"] = "integer"
		for _, limit := range [][2]string{{"min", "minimum"}, {"max", "maximum"}} {
			if n, err := strconv.Atoi(f.Tag.Get(limit[0])); err == nil {
				out[limit[1]] = n
			}
		}
	default:
		out["type"] = "string"
		if all := f.Tag.Get("enum"); all != "" {
			out["enum"] = strings.Split(all, ",")
		}
	}
	return out
}

func settingDoc(k Key) string {
	switch k {
	case sriov.MAC:
		return "MAC address, or " + sriov.StableMAC + " to derive one from the PF's permanent address and the VF index"
	case sriov.NodeGUID, sriov.PortGUID:
		return "InfiniBand GUID; GUID" + plusIndex + " adds the VF index; " + sriov.StableGUID + " derives one " +
			"from the PF's and the VF index"
	case sriov.VLAN:
		return "VLAN ID, 0 for none; NUMBER" + plusIndex + " adds the VF index"
	}
	return "the same as in viaduct vf set"
}
