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
	"strings"
	"time"
)

// Dir is where a running host's journal is.
const Dir = "/run/viaduct"

// Changing begins the keys of the records of changes that are under way, by device.
const Changing = "change-"

// Journal is a directory of records.
type Journal struct{ dir string }

// In is the journal in a directory, which need not exist yet.
func In(dir string) *Journal { return &Journal{dir: dir} }

// Dir is the directory; it need not exist yet.
func (j *Journal) Dir() string { return j.dir }

// Keys are the keys of all records that begin so, sorted.
func (j *Journal) Keys(prefix string) ([]string, error) {
	entries, err := os.ReadDir(j.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var keys []string
	for _, e := range entries {
		if key, ok := strings.CutSuffix(e.Name(), ".json"); ok && strings.HasPrefix(key, prefix) {
			keys = append(keys, key)
		}
	}
	return keys, err
}

// Changed is when a record was last made, replaced or removed, as finely as the kernel keeps time; zero if there was none yet.
func (j *Journal) Changed() time.Time {
	if st, err := os.Stat(j.dir); err == nil {
		return st.ModTime()
	}
	return time.Time{}
}

func (j *Journal) file(key string) string { return filepath.Join(j.dir, key+".json") }

// Put writes a record, durably and whole or not at all.
func (j *Journal) Put(key string, record any) error {
	if !filepath.IsLocal(key) {
		return fmt.Errorf("journal: %q is no key", key)
	}
	b, err := json.Marshal(record)
	if err != nil {
		return err
	}
	return WriteFile(j.file(key), append(b, '\n'))
}

// WriteFile makes or replaces a file, durably and whole or not at all, and the directories it is in.
func WriteFile(file string, content []byte) (err error) {
	dir := filepath.Dir(file)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(dir, ".new-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(tmp.Name())
		}
	}()
	_, err = tmp.Write(content)
	if err == nil {
		err = tmp.Sync()
	}
	if err = errors.Join(err, tmp.Close()); err != nil {
		return err
	}
	if err = os.Rename(tmp.Name(), file); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close()) // or a power cut may take the new name back
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
