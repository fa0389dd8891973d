package hostfile

import (
	"bytes"
	"reflect"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v4"

	"viaduct/sriov"
)

// YAML is a declared host as a file that Parse reads. Comments are put above what they are about: a PF's or a device's,
// by its selector as it is written.
func (h *Host) YAML(comments map[string]string) ([]byte, error) {
	n := nodeOf(reflect.ValueOf(h).Elem(), comments)
	if n == nil {
		return []byte("{}\n"), nil
	}
	var b bytes.Buffer
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	if err := e.Encode(n); err != nil {
		return nil, err
	}
	err := e.Close()
	return b.Bytes(), err
}

// nodeOf is a value as YAML, nil if it says nothing.
func nodeOf(v reflect.Value, comments map[string]string) *yaml.Node {
	if s, ok := reflect.TypeAssert[scalar](v.Addr()); ok {
		return word(s.String())
	}

	switch v.Kind() {
	case reflect.Struct:
		if f, ok := onlyScalar(v.Type()); ok {
			return nodeOf(v.FieldByIndex(f.Index), comments)
		}
		return mappingOf(v, comments)
	case reflect.Slice:
		if v.Len() == 0 {
			return nil
		}
		out := &yaml.Node{Kind: yaml.SequenceNode}
		for i := range v.Len() {
			n := nodeOf(v.Index(i), comments)
			if n == nil {
				n = &yaml.Node{Kind: yaml.MappingNode}
			}
			out.Content = append(out.Content, n)
		}
		return out
	case reflect.Bool:
		if v.Bool() {
			return word("true")
		}
	case reflect.Int:
		if v.Int() != 0 {
			return word(strconv.FormatInt(v.Int(), 10))
		}
	case reflect.String:
		return word(v.String())
	}

	return nil
}

func word(text string) *yaml.Node {
	if text == "" {
		return nil
	}
	n := &yaml.Node{Kind: yaml.ScalarNode, Value: text}
	if strings.Contains(text, ":") {
		// Older YAML took some for times.
		n.Style = yaml.DoubleQuotedStyle
	}
	return n
}

func mappingOf(v reflect.Value, comments map[string]string) *yaml.Node {
	out := &yaml.Node{Kind: yaml.MappingNode}
	add := func(key string, value *yaml.Node) {
		if value != nil {
			k := word(key)
			if key == "select" {
				k.HeadComment = comments[value.Value]
			}
			out.Content = append(out.Content, k, value)
		}
	}

	for i := range v.NumField() {
		f := v.Type().Field(i)
		switch name := f.Tag.Get("yaml"); name {
		case "-":
		case ",settings":
			for _, k := range sriov.Keys() {
				if value, ok := v.Field(i).Interface().(map[Key]Valued)[k]; ok {
					add(string(k), word(value.String()))
				}
			}
		default:
			n := nodeOf(v.Field(i), comments)
			if n == nil && f.Tag.Get("required") != "" {
				n = word("0")
			}
			add(name, n)
		}
	}

	if len(out.Content) == 0 {
		return nil
	}
	return out
}
