package declared

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"go.yaml.in/yaml/v4"

	"viaduct/cmd/internal/hostfile"
	"viaduct/iommu"
	"viaduct/sriov"
)

// ethernet is what netplan declares of an interface that matters here
// (https://netplan.readthedocs.io/en/stable/netplan-yaml/).
type ethernet struct {
	Match struct {
		MAC    string `yaml:"macaddress"`
		Name   string `yaml:"name"`
		Driver words  `yaml:"driver"`
	} `yaml:"match"`
	SetName string `yaml:"set-name"`
	MAC     string `yaml:"macaddress"`
	Link    string `yaml:"link"`
	Count   *int   `yaml:"virtual-function-count"`
	Eswitch string `yaml:"embedded-switch-mode"`
	Delay   bool   `yaml:"delay-virtual-functions-rebind"`
	MTU     int    `yaml:"mtu"`
}

// words is a word, or a list of some.
type words []string

// UnmarshalYAML reads both.
func (w *words) UnmarshalYAML(n *yaml.Node) error {
	if n.Kind == yaml.ScalarNode {
		*w = words{n.Value}
		return nil
	}
	return n.Decode((*[]string)(w))
}

// netplanFiles are all files of netplan as one: mappings are merged key by key, lists follow each other, and of any
// other value the last one counts.
func (i *importer) netplanFiles() (*yaml.Node, error) {
	names, content, err := i.files(".yaml", "run/netplan", "etc/netplan", "lib/netplan")
	if err != nil {
		return nil, err
	}
	all := &yaml.Node{Kind: yaml.MappingNode}
	for _, n := range names {
		var file yaml.Node
		if err := yaml.Unmarshal([]byte(content[n]), &file); err != nil {
			return nil, fmt.Errorf("/%s: %w", n, err)
		}
		if len(file.Content) > 0 && file.Content[0].Kind == yaml.MappingNode {
			merge(all, file.Content[0])
		}
	}
	return all, nil
}

// merge merges a mapping into another one.
func merge(into, from *yaml.Node) {
	for k := 0; k+1 < len(from.Content); k += 2 {
		key, value := from.Content[k], from.Content[k+1]
		at := -1
		for old := 0; old+1 < len(into.Content); old += 2 {
			if into.Content[old].Value == key.Value {
				at = old + 1
			}
		}
		switch {
		case at < 0:
			into.Content = append(into.Content, key, value)
		case into.Content[at].Kind == yaml.MappingNode && value.Kind == yaml.MappingNode:
			merge(into.Content[at], value)
		case into.Content[at].Kind == yaml.SequenceNode && value.Kind == yaml.SequenceNode:
			into.Content[at].Content = append(into.Content[at].Content, value.Content...)
		default:
			into.Content[at] = value
		}
	}
}

func (i *importer) netplan() error {
	var all struct {
		Network struct {
			Ethernets map[string]ethernet `yaml:"ethernets"`
			VLANs     map[string]struct {
				Renderer string `yaml:"renderer"`
			} `yaml:"vlans"`
		} `yaml:"network"`
	}
	merged, err := i.netplanFiles()
	if err != nil {
		return err
	}
	if err := merged.Decode(&all); err != nil {
		return fmt.Errorf("netplan: %w", err)
	}
	ports, err := i.ports()
	if err != nil {
		return err
	}

	linked := map[string]int{}
	for _, id := range slices.Sorted(maps.Keys(all.Network.Ethernets)) {
		e := all.Network.Ethernets[id]
		if e.Link == "" {
			continue
		}
		linked[e.Link]++
		for what, set := range map[string]bool{"macaddress": e.MAC != "", "mtu": e.MTU != 0} {
			if set {
				i.note("netplan: %s of %s: only the name of its interface says which VF of %s it is; declare it "+
					"at the VF", what, id, e.Link)
			}
		}
	}
	for _, id := range slices.Sorted(maps.Keys(all.Network.Ethernets)) {
		e := all.Network.Ethernets[id]
		if e.Count == nil && linked[id] == 0 && e.Eswitch == "" {
			// No PF.
			continue
		}
		if err := i.netplanPF(id, &e, linked[id], ports); err != nil {
			return err
		}
	}
	for _, id := range slices.Sorted(maps.Keys(all.Network.VLANs)) {
		if all.Network.VLANs[id].Renderer == "sriov" {
			i.note("netplan: VLAN %s: netplan numbers VFs when it runs; declare it at the VF",
				id)
		}
	}
	return nil
}

// netplanPF declares an interface that has VFs, of which so many are named.
func (i *importer) netplanPF(id string, e *ethernet, named int, ports []port) error {
	pf := hostfile.PF{MTU: e.MTU, Eswitch: e.Eswitch, AfterBond: e.Delay && e.Eswitch == "switchdev", Count: named}
	if e.Count != nil {
		pf.Count = *e.Count
	}
	if pf.Count > 0 {
		pf.VFs = []hostfile.VFs{{Driver: sriov.UseHome}}
	}

	where := "netplan: " + id
	var found []string
	var d *iommu.Device
	for _, p := range ports {
		if e.names(id, &p) {
			found, d = append(found, p.name), p.pf
		}
	}
	switch {
	case len(found) > 1:
		i.note("%s: it matches %s: netplan makes no VFs for several; declare each PF", where,
			strings.Join(found, " and "))
		return nil
	case len(found) == 1:
		return i.addPF(where, pf, d)
	}

	word := id
	switch m := e.Match; {
	case m.MAC != "":
		word = "mac=" + strings.ToLower(m.MAC)
	case e.SetName != "":
		word = e.SetName
	case m.Name != "":
		word = m.Name
	case len(m.Driver) > 0:
		i.note("%s: no PF has driver %s", where, strings.Join(m.Driver, " or "))
		return nil
	}
	match, _, err := i.match(word)
	if err != nil || strings.ContainsAny(word, "*?[") {
		i.note("%s: no PF matches %q", where, word)
		return nil //nolint:nilerr // it is noted
	}
	pf.Select = match
	return i.addPF(where, pf, nil)
}

// names reports whether an interface of a PF is meant: all that is to match does, and what has no match is its name.
func (e *ethernet) names(id string, p *port) bool {
	m := &e.Match
	if m.MAC == "" && m.Name == "" && len(m.Driver) == 0 {
		return p.name == id || e.SetName != "" && p.name == e.SetName
	}
	return (m.MAC == "" || p.hasMAC(m.MAC)) && (len(m.Driver) == 0 || glob(m.Driver, p.driver)) &&
		(m.Name == "" || glob([]string{m.Name}, p.name) || e.SetName != "" && p.name == e.SetName)
}
