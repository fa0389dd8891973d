package migrate

import (
	"bufio"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"
	"unicode"

	"viaduct/cmd/internal/lease"
	"viaduct/cmd/internal/vmm"
	"viaduct/sriov"
)

// Protocol is the version of what the two sides say to each other: JSON lines, of which the first of each side tells
// the version. The source asks, and the destination answers in the order of the questions.
const Protocol = 1

// mostLine is longer than any line.
const mostLine = 8 << 20

// greeting is the first line of each side.
type greeting struct {
	Protocol int    `json:"viaduct_migrate"`
	Version  string `json:"version"`
}

// Question is what the source asks.
type Question struct {
	Number int             `json:"number"`
	Do     string          `json:"do"`             // an Ask's name
	Move   string          `json:"move,omitempty"` // the id of the move
	Guest  string          `json:"guest,omitempty"`
	Body   json.RawMessage `json:"body,omitempty"`
}

// Answer is what the destination answers.
type Answer struct {
	Number  int             `json:"number"`
	Peer    Peer            `json:"peer,omitempty"`
	Why     string          `json:"why,omitempty"`     // its QEMU could not load what came
	Error   string          `json:"error,omitempty"`   // why it was not done
	Refused bool            `json:"refused,omitempty"` // by a check, and nothing was touched
	Body    json.RawMessage `json:"body,omitempty"`
}

// The names of questions on the wire, beside those that are no steps of a move.
var names = map[Action]string{
	AskReserve: "reserve", AskStart: "start", AskLoad: "load", AskTake: "take", AskArrive: "arrive",
	AskRefuse: "refuse",
	AskGiveUp: "give-up", AskForget: "forget",
}

const (
	askFacts = "facts"
	askClock = "clock"
	askLook  = "look"
)

// actionOf is the step that a question asks for.
func actionOf(name string) (Action, bool) {
	for a, n := range names {
		if n == name {
			return a, true
		}
	}
	return "", false
}

// Order is what the destination is told of a guest that is to come.
type Order struct {
	Way      Way            `json:"way"`
	From     string         `json:"from"` // the pool to draw from there
	Count    int            `json:"count"`
	Settings sriov.Settings `json:"settings"` // of its VFs, but for the address
	Address  string         `json:"address"`  // the guest's, "" if it has none
	VM       vmm.Machine    `json:"vm"`
	// Words are the command that starts its VMM, with {devices} where those of viaduct stand. Empty: the destination
	// has a command of its own.
	Words []string `json:"words"`
}

// libvirt reports whether libvirt runs the guest, on both sides.
func (o *Order) libvirt() bool { return o.VM.Libvirt() }

// FactsWish is what the destination is asked beside its own facts.
type FactsWish struct {
	VM      vmm.Machine `json:"vm"`      // is tried with its QEMU
	Program string      `json:"program"` // by this name
	Disks   []string    `json:"disks"`   // are these files there
}

// FactsAnswer is what it answers.
type FactsAnswer struct {
	Facts *Facts          `json:"facts"`
	Disks map[string]bool `json:"disks"`
}

// Times are what the destination saw, by its own clock.
type Times struct {
	Now     time.Time `json:"now"`
	Resumed time.Time `json:"resumed,omitzero"` // the guest went on
	Plugged time.Time `json:"plugged,omitzero"` // it had its device again
	// Downtime is libvirt's, in ms, which only the destination can be asked for.
	Downtime *int `json:"downtime_ms,omitempty"`
}

// line is a pipe of JSON lines.
type line struct {
	r  *bufio.Reader
	w  io.Writer
	mu sync.Mutex
}

func newLine(r io.Reader, w io.Writer) *line { return &line{r: bufio.NewReaderSize(r, 64<<10), w: w} }

// read reads the next line into v; io.EOF at the end.
func (l *line) read(v any) error {
	var text []byte
	for {
		part, err := l.r.ReadSlice('\n')
		if text = append(text, part...); len(text) > mostLine {
			return errors.New("the other side sent a line longer than any")
		}
		if err == nil {
			break
		}
		if errors.Is(err, io.EOF) && len(text) > 0 {
			return io.ErrUnexpectedEOF
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return err
		}
	}
	if err := json.Unmarshal(text, v); err != nil {
		return fmt.Errorf("the other side does not speak as viaduct does: %w", err)
	}
	return nil
}

// write writes a line whole.
func (l *line) write(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	_, err = l.w.Write(append(b, '\n'))
	return err
}

// greet exchanges the first lines. What a login shell prints before them is no part of the conversation, and an error.
func (l *line) greet(version string) error {
	sent := make(chan error, 1)
	go func() { sent <- l.write(greeting{Protocol, version}) }()
	var g greeting
	if err := l.read(&g); err != nil {
		return fmt.Errorf("the other side does not greet: %w", err)
	}
	if g.Protocol != Protocol {
		return fmt.Errorf("the other side's viaduct, %q, speaks version %d of the protocol, and this one %d: "+
			"install the same version on both", g.Version, g.Protocol, Protocol)
	}
	return <-sent
}

// checkID refuses what is no id of a move: it is part of file names.
func checkID(id string) error {
	if b, err := hex.DecodeString(id); err != nil || len(b) != 16 || strings.ToLower(id) != id {
		return fmt.Errorf("invalid move ID %q", id)
	}
	return nil
}

// check refuses an order that no viaduct gives, whoever is at the other end.
func (o *Order) check() error {
	switch o.Way {
	case ByFailover, ByVFIO, ByReplug:
	default:
		return fmt.Errorf("unknown way %q to move a device", o.Way)
	}

	const mostDevices, mostWords, mostWord = 64, 4096, 64 << 10
	if o.Count < 1 || o.Count > mostDevices {
		return fmt.Errorf("%d devices cannot move", o.Count)
	}
	if !printable(o.From) || !printable(o.VM.Standby) || !printable(o.VM.CPU) || !printable(o.VM.Machine) {
		return errors.New("a name has signs that no name has")
	}

	var settings []string
	for k, v := range o.Settings {
		settings = append(settings, string(k)+"="+v)
	}

	if len(settings) > 0 {
		if _, err := sriov.ParseSettings(settings); err != nil {
			return err
		}
	}

	if o.Settings[sriov.MAC] != "" {
		return errors.New("a device must not have the guest's address before the guest is there")
	}

	if o.Address != "" {
		mac, err := net.ParseMAC(o.Address)
		if err != nil || len(mac) != 6 || mac[0]&1 == 1 || strings.Trim(o.Address, "0:") == "" {
			return fmt.Errorf("%q is no MAC address of a guest", o.Address)
		}
	}

	if len(o.Words) > mostWords {
		return fmt.Errorf("a command of %d words", len(o.Words))
	}

	for _, w := range o.Words {
		if len(w) > mostWord || strings.ContainsRune(w, 0) {
			return errors.New("the command has an invalid word")
		}
	}

	return nil
}

// printable reports whether a name has no signs that could be taken for something else.
func printable(s string) bool {
	return len(s) < 4096 && !strings.ContainsFunc(s, func(r rune) bool {
		return unicode.IsControl(r) ||
			r == unicode.ReplacementChar
	})
}

// check refuses a question that no viaduct asks.
func (q *Question) check() error {
	if q.Do == askFacts || q.Do == askClock {
		return nil
	}
	return errors.Join(checkID(q.Move), lease.CheckGuest(q.Guest))
}
