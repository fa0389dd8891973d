// Package journal keeps what viaduct must know to undo its changes, and what it knows of devices from one boot to the
// next: small records in a folder of the host, each written durably and whole or not at all.
package journal

import (
	"encoding/json"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"viaduct/internal/host"
)

// Dir is where the journal of changes is, below the host's root: it dies with the boot, as the state that it describes
// does.
const Dir = "run/viaduct"

// Changing begins the keys of the records of changes that are under way, by device.
const Changing = "change-"

// Taken begins the keys of the records of devices that are taken, by device.
const Taken = "taken-"

// Lease begins the keys of the records of devices that are assigned to guests, by guest.
const Lease = "lease-"

// Journal is a directory of records. That of a captured host can be read, and every write is an error.
type Journal struct {
	host *host.Host
	dir  string
}

// In is the journal in a directory of a host, named from its root; it need not exist yet.
func In(h *host.Host, dir string) *Journal { return &Journal{host: h, dir: dir} }

// Dir is the whole path of the directory; it need not exist yet.
func (j *Journal) Dir() string { return j.host.Path(j.dir) }

// Keys are the keys of all records that begin so, sorted.
func (j *Journal) Keys(prefix string) ([]string, error) {
	names, err := j.host.Names(j.dir)
	if host.Absent(err) {
		return nil, nil
	}

	var keys []string
	for _, n := range names {
		if key, ok := strings.CutSuffix(n, ".json"); ok && strings.HasPrefix(key, prefix) {
			keys = append(keys, key)
		}
	}
	return keys, err
}

// Changed is when a record was last made, replaced or removed, as finely as the kernel keeps time; zero if there was
// none yet.
func (j *Journal) Changed() time.Time {
	if st, err := os.Stat(j.Dir()); err == nil {
		return st.ModTime()
	}
	return time.Time{}
}

func (j *Journal) file(key string) string { return path.Join(j.dir, key+".json") }

// Put writes a record, durably and whole or not at all.
func (j *Journal) Put(key string, record any) error {
	if !filepath.IsLocal(key) {
		return fmt.Errorf("journal: %q is not a valid key", key)
	}
	b, err := json.Marshal(record)
	if err != nil {
		return err
	}
	return j.host.Replace(j.file(key), append(b, '\n'))
}

// Get reads a record; false if there is none.
func (j *Journal) Get(key string, record any) (bool, error) {
	b, err := j.host.Read(j.file(key))
	if host.Absent(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}

	if err := json.Unmarshal(b, record); err != nil {
		return false, fmt.Errorf("%s: %w", j.host.Path(j.file(key)), err)
	}
	return true, nil
}

// Delete removes a record; it is no error if there is none.
func (j *Journal) Delete(key string) error { return j.host.Remove(j.file(key)) }
