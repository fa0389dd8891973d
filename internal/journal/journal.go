// Package journal keeps what viaduct must know to undo its changes: small records below /run/viaduct, which die with the
// boot, as the state they describe does.
package journal

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Dir is where a running host's journal is.
const Dir = "/run/viaduct"

// Journal is a directory of records.
type Journal struct{ dir string }

// In is the journal in a directory, which need not exist yet.
func In(dir string) *Journal { return &Journal{dir: dir} }

func (j *Journal) file(key string) string { return filepath.Join(j.dir, key+".json") }

// Put writes a record, durably and whole or not at all.
func (j *Journal) Put(key string, record any) (err error) {
	if !filepath.IsLocal(key) {
		return fmt.Errorf("journal: %q is no key", key)
	}
	b, err := json.Marshal(record)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(j.dir, 0o755); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(j.dir, ".new-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(tmp.Name()))
		}
	}()
	_, err = tmp.Write(append(b, '\n'))
	if err == nil {
		err = tmp.Sync()
	}
	if err = errors.Join(err, tmp.Close()); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), j.file(key))
}

// Get reads a record; false if there is none, as in a nil Journal: that of a captured host.
func (j *Journal) Get(key string, record any) (bool, error) {
	if j == nil {
		return false, nil
	}
	b, err := os.ReadFile(j.file(key))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if err := json.Unmarshal(b, record); err != nil {
		return false, fmt.Errorf("%s: %w", j.file(key), err)
	}
	return true, nil
}

// Delete removes a record; it is no error if there is none.
func (j *Journal) Delete(key string) error {
	if err := os.Remove(j.file(key)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
