package hostfile

import (
	"reflect"
	"strings"

	"viaduct/sriov"
)

// Section is a mapping of host.yaml, for the manual.
type Section struct {
	Name string // as in "pfs[].vfs[]"
	Keys []KeyHelp
}

// KeyHelp is a key with what it takes, and what it means.
type KeyHelp struct{ Name, Help string }

// Reference is every key of host.yaml, made from the types it is read into.
func Reference() []Section {
	var out []Section
	reference("host.yaml", reflect.TypeFor[Host](), &out)
	return out
}

func reference(name string, t reflect.Type, out *[]Section) {
	s := Section{Name: name}
	at := len(*out)
	*out = append(*out, s)
	for field := range t.Fields() {
		key := field.Tag.Get("yaml")
		switch key {
		case "-":
			continue
		case ",settings":
			for _, k := range sriov.Keys() {
				s.Keys = append(s.Keys, KeyHelp{string(k), settingDoc(k)})
			}
			continue
		}
		s.Keys = append(s.Keys, KeyHelp{key, keyDoc(&field)})

		element := field.Type
		if element.Kind() == reflect.Slice {
			element = element.Elem()
		}
		if element.Kind() != reflect.Struct || field.Type.Kind() != reflect.Slice {
			continue
		}
		if _, scalar := onlyScalar(element); !scalar && mapping(element) {
			reference(strings.TrimPrefix(name+"."+key+"[]", "host.yaml."), element, out)
		}
	}
	(*out)[at] = s
}

// mapping reports whether a type is read from keys.
func mapping(t reflect.Type) bool {
	for field := range t.Fields() {
		if key := field.Tag.Get("yaml"); key != "" && key != "-" {
			return true
		}
	}
	return false
}

func keyDoc(f *reflect.StructField) string {
	doc := f.Tag.Get("doc")
	if all := f.Tag.Get("enum"); all != "" {
		doc += " (" + strings.ReplaceAll(all, ",", ", ") + ")"
	}
	if f.Tag.Get("required") != "" {
		doc += " (required)"
	}
	return doc
}
