package main

import (
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// jsonObjects are the objects of docs/json.md, by section.
var jsonObjects = map[string]reflect.Type{
	"GROUP": reflect.TypeFor[groupView](), "DEVICE": reflect.TypeFor[deviceView](),
	"show SELECTOR": reflect.TypeFor[showView](),
	"show group=N":  reflect.TypeFor[showGroupView](), "bind, unbind": reflect.TypeFor[changeView](),
	"WRITE": reflect.TypeFor[writeView](), "REFUSAL": reflect.TypeFor[refusalView](),
	"FAILED":  reflect.TypeFor[failedView](),
	"vf list": reflect.TypeFor[vfListView](), "PF": reflect.TypeFor[pfView](), "VF": reflect.TypeFor[vfView](),
	"vf create, vf destroy": reflect.TypeFor[countView](), "vf set, vf sync": reflect.TypeFor[setView](),
	"plan, status, apply --dry-run": reflect.TypeFor[itemView](), "verify": reflect.TypeFor[verifyView](),
	"assign --format json": reflect.TypeFor[leaseView](), "leases": reflect.TypeFor[leasesView](),
	"release": reflect.TypeFor[certificateView](), "pool": reflect.TypeFor[poolView](),
	"why": reflect.TypeFor[whyView](), "doctor": reflect.TypeFor[doctorView](), "iommu": reflect.TypeFor[iommuReport](),
	"UNIT":                           reflect.TypeFor[unitReportView](),
	"assign --dry-run --format json": reflect.TypeFor[previewView](),
}

// docs/json.md has each field of each object, and no other. Fields of an object that has no section of its own are named
// where the object is.
func TestJSONDocs(t *testing.T) {
	b, err := os.ReadFile("docs/json.md")
	if err != nil {
		t.Fatal(err)
	}
	sections := map[string]map[string]string{}
	for section := range strings.SplitSeq(string(b), "\n## ") {
		name, rest, _ := strings.Cut(section, "\n")
		items := map[string]string{}
		for item := range strings.SplitSeq("\n"+rest, "\n- `") {
			if key, text, ok := strings.Cut(item, "`: "); ok {
				items[key] = text
			}
		}
		sections[name] = items
	}

	own := slices.Collect(maps.Values(jsonObjects))
	for name, object := range jsonObjects {
		items, ok := sections[name]
		if !ok {
			t.Errorf("there is no section %s", name)
			continue
		}
		for key, f := range fieldsOf(object, own) {
			text, ok := items[key]
			delete(items, key)
			if !ok {
				t.Errorf("%s: %s is missing", name, key)
				continue
			}
			for inner := range within(f, own) {
				if !strings.Contains(text, inner) {
					t.Errorf("%s: %s does not name %s", name, key, inner)
				}
			}
		}
		for key := range items {
			t.Errorf("%s: there is no %s", name, key)
		}
	}
}

// fieldsOf are the fields of an object by their names in JSON; what is embedded and has a section of its own is left out.
func fieldsOf(object reflect.Type, own []reflect.Type) map[string]reflect.Type {
	out := map[string]reflect.Type{}
	for f := range object.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case f.Anonymous && name == "":
			embedded := f.Type
			if embedded.Kind() == reflect.Pointer {
				embedded = embedded.Elem()
			}
			if !slices.Contains(own, embedded) {
				maps.Copy(out, fieldsOf(embedded, own))
			}
		case f.IsExported() && name != "-" && name != "":
			out[name] = f.Type
		}
	}
	return out
}

// within are the names of all fields within a value, but those of objects with a section of their own.
func within(t reflect.Type, own []reflect.Type) map[string]bool {
	out := map[string]bool{}
	for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice || t.Kind() == reflect.Map {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct || slices.Contains(own, t) {
		return out
	}
	for name, f := range fieldsOf(t, own) {
		out[name] = true
		maps.Copy(out, within(f, own))
	}
	return out
}
