package hostfile

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"

	"viaduct/internal/nearest"
	"viaduct/sriov"
	"viaduct/vfio/bind"
)

// Most errors of one file that are told, and most values a file may have, with those that aliases repeat.
const (
	mostErrors = 20
	mostValues = 2_000_000
)

// Parse reads one file. What it returns beside errors is what could be read. Each error is an *Error; it tells at most
// the first twenty.
func Parse(file string, content []byte) (*Host, error) {
	d := decoder{file: file}
	h := &Host{}
	var doc yaml.Node
	loader, err := yaml.NewLoader(strings.NewReader(string(content)))
	if err == nil {
		err = loader.Load(&doc)
	}
	if err != nil {
		if doc.Kind == 0 && strings.TrimSpace(string(content)) == "" || isEnd(err) {
			return h, nil
		}
		return h, d.syntax(content, err)
	}

	var second yaml.Node
	if err := loader.Load(&second); err == nil {
		d.fail(&second, "", "a second YAML document; want one in a file")
	} else if !isEnd(err) {
		return h, d.syntax(content, err)
	}

	if len(doc.Content) > 0 && !isNull(doc.Content[0]) {
		d.decode(doc.Content[0], reflect.ValueOf(h).Elem(), nil)
	}
	if len(d.errs) == 0 {
		d.check(h)
	}
	return h, errors.Join(d.errs...)
}

type decoder struct {
	file   string
	values int
	errs   []error
}

func (d *decoder) fail(n *yaml.Node, text, format string, args ...any) {
	d.failAt(Pos{d.file, n.Line, n.Column}, text, format, args...)
}

func (d *decoder) failAt(at Pos, text, format string, args ...any) {
	const longest = 60
	if len(text) > longest {
		text = text[:longest] + "..."
	}
	if len(d.errs) < mostErrors {
		d.errs = append(d.errs, &Error{at, text, fmt.Sprintf(format, args...)})
	}
}

// syntax is what the YAML reader says, with the line it says it of.
func (d *decoder) syntax(content []byte, err error) error {
	e := &Error{At: Pos{File: d.file}, Why: "invalid YAML: " + strings.TrimPrefix(err.Error(), "yaml: ")}
	if load, ok := errors.AsType[*yaml.LoadError](err); ok {
		e.Why = "invalid YAML: " + load.Message
		e.At.Line, e.At.Column = load.Mark.Line, load.Mark.Column
	}

	if e.At.Line == 0 {
		// It tells no place of what is no text.
		e.At.Line, e.At.Column = 1, 1
		for _, c := range string(content) {
			if c == '\n' {
				e.At.Line, e.At.Column = e.At.Line+1, 0
			} else if c < ' ' && c != '\t' && c != '\r' || c == utf8.RuneError {
				break
			}
			e.At.Column++
		}
	}

	lines := strings.Split(string(content), "\n")
	if e.At.Line > 0 && e.At.Line <= len(lines) {
		e.Text = strings.TrimSpace(lines[e.At.Line-1])
		if strings.HasPrefix(strings.TrimLeft(lines[e.At.Line-1], " "), "\t") {
			e.Why += " (a tab; YAML indents with spaces)"
		}
	}
	return e
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.Tag == "!!null" }

func kindOf(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	}
	return "one value"
}

// decode puts a node into a value, and tells all that is wrong with it.
func (d *decoder) decode(n *yaml.Node, v reflect.Value, f *reflect.StructField) {
	if d.values++; d.values > mostValues {
		if d.values == mostValues+1 {
			d.fail(n, "", "more than %d values", mostValues)
		}
		return
	}

	if n.Kind == yaml.AliasNode && n.Alias != nil {
		n = n.Alias
	}
	if s, ok := reflect.TypeAssert[scalar](v.Addr()); ok {
		if text, ok := d.text(n); ok {
			if err := s.parse(text); err != nil {
				d.fail(n, text, "%v", err)
			}
		}
		return
	}

	switch v.Kind() {
	case reflect.Struct:
		if field, ok := onlyScalar(v.Type()); ok {
			setPos(v, Pos{d.file, n.Line, n.Column})
			d.decode(n, v.FieldByIndex(field.Index), field)
			return
		}

		d.mapping(n, v)
	case reflect.Slice:
		if isNull(n) {
			return
		}
		if n.Kind == yaml.ScalarNode && v.Type() == reflect.TypeFor[Matches]() {
			n = &yaml.Node{Kind: yaml.SequenceNode, Content: []*yaml.Node{n}}
		}
		if n.Kind != yaml.SequenceNode {
			d.fail(n, n.Value, "want a list, not %s", kindOf(n))
			return
		}

		for _, item := range n.Content {
			v.Set(reflect.Append(v, reflect.Zero(v.Type().Elem())))
			d.decode(item, v.Index(v.Len()-1), nil)
		}
	case reflect.Bool:
		if text, ok := d.text(n); ok {
			if text != "true" && text != "false" {
				d.fail(n, text, "want true or false")
			}
			v.SetBool(text == "true")
		}
	case reflect.Int:
		if text, ok := d.text(n); ok {
			low, _ := strconv.Atoi(f.Tag.Get("min"))
			high, _ := strconv.Atoi(f.Tag.Get("max"))
			i, err := strconv.Atoi(text)
			if err != nil || i < low || i > high {
				d.fail(n, text, "want a number from %d to %d", low, high)
			}
			v.SetInt(int64(i))
		}
	case reflect.String:
		if text, ok := d.text(n); ok {
			if all := f.Tag.Get("enum"); all != "" && !slices.Contains(strings.Split(all, ","), text) {
				d.fail(n, text, "want %s", strings.ReplaceAll(all, ",", " or "))
			} else if text == "" {
				d.fail(n, text, "want a word")
			} else if parse := driverWords[f.Tag.Get("word")]; parse != nil {
				driver, err := parse(text)
				if err != nil {
					d.fail(n, text, "%v", err)
				}
				text = driver
			}
			v.SetString(text)
		}
	}
}

// driverWords read what names a driver.
var driverWords = map[string]func(string) (string, error){
	"driver": bind.ParseDriver,
	"use": func(word string) (string, error) {
		use, err := sriov.ParseUse(word)
		return string(use), err
	},
}

// text is a scalar's.
func (d *decoder) text(n *yaml.Node) (string, bool) {
	switch {
	case n.Kind != yaml.ScalarNode:
		d.fail(n, "", "want one value, not %s", kindOf(n))
		return "", false
	case isNull(n):
		d.fail(n, n.Value, "the value is missing")
		return "", false
	}
	return n.Value, true
}

// mapping puts a mapping into a struct.
func (d *decoder) mapping(n *yaml.Node, v reflect.Value) {
	if n.Kind != yaml.MappingNode {
		d.fail(n, n.Value, "want a mapping with the keys %s, not %s", strings.Join(keysOf(v.Type()), ", "), kindOf(n))
		return
	}

	setPos(v, Pos{d.file, n.Line, n.Column})
	seen := map[string]*yaml.Node{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		if first := seen[key.Value]; first != nil {
			d.fail(key, key.Value, "this key is already on line %d", first.Line)
			continue
		}
		seen[key.Value] = key
		if field, ok := fieldOf(v.Type(), key.Value); ok {
			d.decode(value, v.FieldByIndex(field.Index), field)
		} else if settings, ok := settingsOf(v); ok && slices.Contains(sriov.Keys(), Key(key.Value)) {
			d.setting(value, settings, Key(key.Value))
		} else {
			keys := keysOf(v.Type())
			d.fail(key, key.Value, "unknown key%s; the keys are %s", nearest.Ask(key.Value, keys),
				strings.Join(keys, ", "))
		}
	}

	either := map[bool][]string{}
	for i := range v.NumField() {
		f := v.Type().Field(i)
		name := f.Tag.Get("yaml")
		if f.Tag.Get("required") != "" && seen[name] == nil {
			d.fail(n, "", "the key %s is missing", name)
		}
		if f.Tag.Get("either") != "" {
			either[seen[name] != nil] = append(either[seen[name] != nil], name)
		}
	}
	switch {
	case len(either[true]) > 1:
		d.fail(n, "", "want one of the keys %s, not both", strings.Join(either[true], " and "))
	case len(either[false]) > 1:
		d.fail(n, "", "the key %s is missing", strings.Join(either[false], " or "))
	}
}

func (d *decoder) setting(n *yaml.Node, into reflect.Value, key Key) {
	if n.Kind == yaml.AliasNode && n.Alias != nil {
		n = n.Alias
	}
	text, ok := d.text(n)
	if !ok {
		return
	}
	value, err := parseValued(key, text)
	if err != nil {
		d.fail(n, text, "%v", err)
		return
	}
	if into.IsNil() {
		into.Set(reflect.MakeMap(into.Type()))
	}
	into.SetMapIndex(reflect.ValueOf(key), reflect.ValueOf(value))
}

func setPos(v reflect.Value, at Pos) {
	if f := v.FieldByName("At"); f.IsValid() {
		f.Set(reflect.ValueOf(at))
	}
}

func fieldOf(t reflect.Type, key string) (*reflect.StructField, bool) {
	for f := range t.Fields() {
		if key != "-" && f.Tag.Get("yaml") == key {
			return &f, true
		}
	}
	return nil, false
}

// onlyScalar is the field of a struct that is written as one value, and has it with its place.
func onlyScalar(t reflect.Type) (*reflect.StructField, bool) { return fieldOf(t, ",scalar") }

// settingsOf is the map that takes a struct's VF settings.
func settingsOf(v reflect.Value) (reflect.Value, bool) {
	if f, ok := fieldOf(v.Type(), ",settings"); ok {
		return v.FieldByIndex(f.Index), true
	}
	return reflect.Value{}, false
}

// keysOf are a struct's keys as they are written.
func keysOf(t reflect.Type) []string {
	var out []string
	for f := range t.Fields() {
		switch name := f.Tag.Get("yaml"); name {
		case "-":
		case ",settings":
			for _, k := range sriov.Keys() {
				out = append(out, string(k))
			}
		default:
			out = append(out, name)
		}
	}
	return out
}
