package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"
)

// SettingsFile is where a node's settings are written down.
const SettingsFile = "/etc/viaduct/kube.yaml"

// Provider is who serves a pool to the cluster.
type Provider string

// The providers. A pool has one, as two would each give the same function to a pod.
const (
	DRA          Provider = "dra"
	DevicePlugin Provider = "device-plugin"
	Nobody       Provider = "none"
)

// Effect is what happens to pods on account of a problem: nothing, no new ones are scheduled, or those that run are
// evicted.
type Effect string

// The effects, as Kubernetes calls them.
const (
	Ignore     Effect = "None"
	NoSchedule Effect = "NoSchedule"
	NoExecute  Effect = "NoExecute"
)

// Settings are a node's settings.
type Settings struct {
	// Pools say by pool who serves it. What is not named DRA serves; "" is what is declared without a pool.
	Pools map[string]Provider `json:"pools,omitempty"`
	// Taints say by reason what a problem does. What is not named is as [Settings.Effect] says.
	Taints map[Reason]Effect `json:"taints,omitempty"`
}

// LoadSettings reads settings from a file. None are those that are usual.
func LoadSettings(file string) (*Settings, error) {
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return &Settings{}, nil
	}
	if err != nil {
		return nil, err
	}
	s, err := ParseSettings(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return s, nil
}

// ParseSettings reads settings. What is not known in them is an error.
func ParseSettings(text []byte) (*Settings, error) {
	s := &Settings{}
	if err := yaml.UnmarshalStrict(text, s); err != nil {
		return nil, err
	}
	for pool, p := range s.Pools {
		if !slices.Contains([]Provider{DRA, DevicePlugin, Nobody}, p) {
			return nil, fmt.Errorf("pool %s: unknown provider %q: want dra, device-plugin or none", pool, p)
		}
		if p != DevicePlugin {
			continue
		}
		if pool == "" {
			return nil, errors.New("a device plugin needs the name of a pool: declare the devices in one")
		}
		if err := CheckPool(pool); err != nil {
			return nil, err
		}
	}
	for reason, e := range s.Taints {
		if !slices.Contains(Reasons(), reason) {
			return nil, fmt.Errorf("unknown reason %q for a taint: want one of %v", reason, Reasons())
		}
		if !slices.Contains([]Effect{Ignore, NoSchedule, NoExecute}, e) {
			return nil, fmt.Errorf("taint %s: unknown effect %q: want None, NoSchedule or NoExecute", reason, e)
		}
	}
	return s, nil
}

// Provider is who serves a pool.
func (s *Settings) Provider(pool string) Provider {
	if p, said := s.Pools[pool]; said {
		return p
	}
	return DRA
}

// Effect is what a problem does. A function that a pod has lost evicts it; all else only keeps new pods away.
func (s *Settings) Effect(reason Reason) Effect {
	if e, said := s.Taints[reason]; said {
		return e
	}
	switch reason {
	case NoDriver, NoNode, NotThere, NotViable, NoPF:
		return NoExecute
	}
	return NoSchedule
}

// CheckPool refuses a pool whose name cannot be part of a resource's, a device class's and a CDI kind's name.
func CheckPool(pool string) error {
	bad := func(r rune) bool { return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' }
	if pool == "" || len(pool) > 63 || strings.ContainsFunc(pool, bad) || pool[0] < 'a' ||
		strings.HasSuffix(pool, "-") {
		return fmt.Errorf("pool %q cannot be served: rename it in host.yaml to lower-case letters, digits and dashes, "+
			"with a letter first", pool)
	}
	return nil
}

// Serves reports whether a provider serves the function.
func (s *Settings) Serves(p Provider, f *Function) bool { return s.Provider(f.Pool) == p }
