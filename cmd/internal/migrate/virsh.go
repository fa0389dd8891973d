package migrate

import (
	"bytes"
	"cmp"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"viaduct/cmd/internal/lease"
)

// This file is the one that starts virsh, which says to libvirt what is to be done with its domains (virsh(1)).

var virshProgram = "/usr/bin/virsh"

// libvirt is the libvirt of one host, by its URI.
type libvirt string

const libvirtHere libvirt = "qemu:///system"

// command is virsh with these words, in words of its own that no locale changes.
func (l libvirt) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, virshProgram, append([]string{"-q", "-c", string(l)}, args...)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	return cmd
}

// virsh runs virsh to its end, and returns what it printed.
func (l libvirt) virsh(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("libvirt does not answer within a minute"))
	defer cancel()
	out, err := l.command(ctx, args...).Output()
	if exit, is := errors.AsType[*exec.ExitError](err); is {
		err = fmt.Errorf("virsh %s: %s", args[0], cmp.Or(virshSaid(exit.Stderr), exit.Error()))
	}
	return strings.TrimSpace(string(out)), errors.Join(err, context.Cause(ctx))
}

// virshSaid is what virsh printed as an error, in one line.
func virshSaid(text []byte) string {
	said := strings.TrimSpace(strings.ToValidUTF8(string(text), "?"))
	return strings.ReplaceAll(strings.ReplaceAll(said, "error: ", ""), "\n", "; ")
}

// libvirtVersion is the version of the libvirt that runs here.
func libvirtVersion(ctx context.Context) (string, error) {
	text, err := libvirtHere.virsh(ctx, "version", "--daemon")
	return virshField(text, "Running against daemon"), err
}

// virshField is the value of a line "NAME: VALUE" that virsh prints.
func virshField(text, name string) string {
	for line := range strings.Lines(text) {
		if key, value, is := strings.Cut(line, ":"); is && strings.TrimSpace(key) == name {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// domain is a guest that libvirt runs.
type domain struct {
	libvirt

	name string
	host string   // the PCI address of its device that moves; "" if it has none
	sent *sending // that this process has begun; nil if none
}

// sending is libvirt at sending a guest to another host.
type sending struct {
	ended  chan struct{} // closed at the end, when why is known
	why    error
	cancel context.CancelFunc
}

func (s *sending) close() {
	s.cancel()
	<-s.ended
}

func (s *sending) over() bool {
	select {
	case <-s.ended:
		return true
	default:
		return false
	}
}

func (*domain) Ended() error { return errors.New("each question is asked again") }
func (*domain) Close() error { return nil }

// there reports whether libvirt has the domain running, or standing still.
func (m *domain) there(ctx context.Context) (bool, error) {
	text, err := m.virsh(ctx, "list", "--name")
	return slices.Contains(strings.Split(text, "\n"), m.name), err
}

// gone reports whether an error is of a domain that has gone meanwhile.
func (m *domain) gone(ctx context.Context, err error) bool {
	if err == nil {
		return false
	}
	there, err := m.there(ctx)
	return err == nil && !there
}

func (m *domain) look() (status string, p progress, err error) {
	ctx := context.Background()
	there, err := m.there(ctx)
	if err != nil {
		return "", p, err
	}
	if there {
		if status, p, err = m.state(ctx); m.gone(ctx, err) {
			status, err = "", nil
		}
	}
	switch {
	case m.sent == nil:
	case !m.sent.over():
		p.Status = "active"
	case m.sent.why != nil && p.Status == "":
		p.Status, p.Why = "failed", m.sent.why.Error()
	}
	return status, p, err
}

// state is look of a domain that is there.
func (m *domain) state(ctx context.Context) (status string, p progress, err error) {
	status, err1 := m.virsh(ctx, "domstate", m.name)
	if status == "idle" {
		status = "running"
	}
	job, err2 := m.virsh(ctx, "domjobinfo", m.name)
	kind := virshField(job, "Job type")
	if kind != "" && kind != "None" && virshField(job, "Operation") == "Outgoing migration" {
		p.Status = "active"
	}
	return status, p, errors.Join(err1, err2)
}

// xml is the domain as it is now, or, with --inactive, as it is started next.
func (m *domain) xml(ctx context.Context, more ...string) ([]byte, error) {
	text, err := m.virsh(ctx, append([]string{"dumpxml", m.name}, more...)...)
	return []byte(text), err
}

func (m *domain) has(string) (bool, error) {
	text, err := m.xml(context.Background())
	if m.gone(context.Background(), err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	element, err := deviceXML(text, m.host)
	return element != nil, err
}

// deviceXML is the part of a domain that is its device of this PCI address of the host, as it stands there; nil if it
// has none.
func deviceXML(text []byte, host string) ([]byte, error) {
	in := xml.NewDecoder(bytes.NewReader(text))
	for {
		from := in.InputOffset()
		token, err := in.Token()
		if errors.Is(err, io.EOF) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		start, is := token.(xml.StartElement)
		if !is || start.Name.Local != "interface" && start.Name.Local != "hostdev" {
			continue
		}
		if err := in.Skip(); err != nil {
			return nil, err
		}
		part := text[from:in.InputOffset()]
		d, err := lease.ParseDomain(slices.Concat([]byte("<domain><devices>"), part, []byte("</devices></domain>")))
		if err != nil {
			return nil, err
		}
		if len(d.Devices) == 1 && d.Devices[0].Address.String() == host {
			return part, nil
		}
	}
}

// device has virsh do something with a device that is told as XML.
func (m *domain) device(ctx context.Context, what string, text []byte, where string) error {
	f, err := os.CreateTemp("", "viaduct-*.xml")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }()
	_, err = f.Write(text)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	_, err = m.virsh(ctx, what, m.name, f.Name(), where)
	return err
}

// next does something with the device in the domain as it is started next, if it has one there or has none, as had
// says; a domain that is not kept has no next start.
func (m *domain) next(ctx context.Context, what string, text []byte, had bool) error {
	kept, err := m.kept(ctx)
	if err != nil || !kept {
		return err
	}
	all, err := m.xml(ctx, "--inactive")
	if err != nil {
		return err
	}
	part, err := deviceXML(all, m.host)
	if err != nil || (part != nil) != had {
		return err
	}
	if text == nil {
		text = part
	}
	return m.device(ctx, what, text, "--config")
}

// kept reports whether libvirt keeps the domain when it has ended.
func (m *domain) kept(ctx context.Context) (bool, error) {
	text, err := m.virsh(ctx, "list", "--persistent", "--all", "--name")
	return slices.Contains(strings.Split(text, "\n"), m.name), err
}

func (m *domain) unplug(ctx context.Context, _ string, wait time.Duration) (time.Time, error) {
	text, err := m.xml(ctx)
	if err != nil {
		return time.Time{}, err
	}
	part, err := deviceXML(text, m.host)
	if err != nil {
		return time.Time{}, err
	}
	if part != nil {
		ctx, cancel := context.WithTimeoutCause(ctx, wait, fmt.Errorf("the guest has not let go of it within %s", wait))
		defer cancel()
		// It gives up waiting for the guest before we do, and says so.
		asked := m.device(ctx, "detach-device", part, "--live")
		if err := m.until(ctx, false); err != nil {
			return time.Time{}, errors.Join(err, asked)
		}
	}
	return time.Now(), m.next(ctx, "detach-device", nil, true)
}

// until waits until the guest has its device, or has not.
func (m *domain) until(ctx context.Context, plugged bool) error {
	for {
		has, err := m.has("")
		if err == nil && has == plugged {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), err)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func (m *domain) plug(ctx context.Context, _ string, args map[string]any) error {
	text, _ := args["xml"].(string)
	there, err := m.has("")
	if err != nil {
		return err
	}
	if !there {
		if err := m.device(ctx, "attach-device", []byte(text), "--live"); err != nil {
			return err
		}
		if there, err = m.has(""); err != nil || !there {
			return errors.Join(errors.New("libvirt took the device and does not show it"), err)
		}
	}
	return m.next(ctx, "attach-device", []byte(text), false)
}

// announce is left to QEMU, which does it where a guest goes on: libvirt has no call for it.
func (*domain) announce() error { return nil }

// load is libvirt's own doing.
func (*domain) load(string) error { return nil }

// send begins to send the guest to the libvirt of a URI, from libvirt to libvirt, and over that connection alone.
func (m *domain) send(ctx context.Context, uri string, bandwidth uint64) (*sending, error) {
	words := []string{"migrate", "--live", "--p2p", "--tunnelled"}
	kept, err := m.kept(ctx)
	if err != nil {
		return nil, err
	}
	if kept {
		words = append(words, "--persistent", "--undefinesource")
	}
	if bandwidth > 0 {
		words = append(words, "--bandwidth", strconv.FormatUint(max(bandwidth>>20, 1), 10))
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	s := &sending{ended: make(chan struct{}), cancel: cancel}
	cmd := m.command(ctx, append(words, m.name, uri)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		cancel()
		return nil, err
	}
	go func() {
		defer close(s.ended)
		if err := cmd.Wait(); err != nil {
			s.why = errors.New(cmp.Or(virshSaid(said.Bytes()), err.Error()))
		}
	}()
	return s, nil
}

func (m *domain) settled(ctx context.Context, _ func(progress)) (progress, error) {
	for {
		_, p, err := m.look()
		if err != nil || copied(p.Status) != Underway {
			return p, err
		}
		var ended chan struct{}
		if m.sent != nil {
			ended = m.sent.ended
		}
		select {
		case <-ctx.Done():
			return p, context.Cause(ctx)
		case <-ended:
		case <-time.After(time.Second):
		}
	}
}

func (m *domain) cancel() error {
	_, err := m.virsh(context.Background(), "domjobabort", m.name)
	return err
}

func (*domain) stopped() time.Time { return time.Time{} }

func (m *domain) goOn(ctx context.Context) (time.Time, error) {
	status, _, err := m.look()
	if err != nil || status == "running" {
		return time.Time{}, err
	}
	_, err = m.virsh(ctx, "resume", m.name)
	return time.Now(), err
}

func (m *domain) quit(ctx context.Context) error {
	there, err := m.there(ctx)
	if err != nil || !there {
		return err
	}
	_, err = m.virsh(ctx, "destroy", m.name)
	return err
}

// downtime is for how long the guest stood still when it came, in ms, as libvirt tells; nil if it does not.
func (m *domain) downtime(ctx context.Context) (*int, error) {
	text, err := m.virsh(ctx, "domjobinfo", m.name, "--completed", "--keep-completed")
	value, _, _ := strings.Cut(virshField(text, "Total downtime"), " ")
	n, wrong := strconv.Atoi(value)
	if err != nil || wrong != nil {
		return nil, err
	}
	return &n, nil
}

// domainFacts is what a move has to know of a domain, as libvirt tells it (docs/formatdomain.rst).
type domainFacts struct {
	Type   string `xml:"type,attr"`
	Memory struct {
		Unit string `xml:"unit,attr"`
		Size uint64 `xml:",chardata"`
	} `xml:"memory"`
	OS struct {
		Type struct {
			Machine string `xml:"machine,attr"`
		} `xml:"type"`
	} `xml:"os"`
	CPU struct {
		Mode  string `xml:"mode,attr"`
		Model string `xml:"model"`
	} `xml:"cpu"`
	Devices struct {
		Disks []struct {
			Source struct {
				File string `xml:"file,attr"`
			} `xml:"source"`
		} `xml:"disk"`
	} `xml:"devices"`
}

// AskDomain asks libvirt for a guest of its own; nil if it has none of this name that runs.
func AskDomain(ctx context.Context, g *Guest) (*VMState, error) {
	m := &domain{libvirt: libvirtHere, name: g.Name}
	if len(g.Devices) > 0 {
		m.host = g.Devices[0].Address
	}

	there, err := m.there(ctx)
	if err != nil || !there {
		return nil, err
	}

	text, err1 := m.xml(ctx)
	status, p, err2 := m.look()
	hypervisor, err3 := m.virsh(ctx, "version")
	if err := errors.Join(err1, err2, err3); err != nil {
		return nil, err
	}

	var x domainFacts
	if err := xml.Unmarshal(text, &x); err != nil {
		return nil, fmt.Errorf("read the domain from libvirt: %w", err)
	}

	a := &VMState{Status: status, Machine: x.OS.Type.Machine}
	_, a.Version, _ = strings.Cut(virshField(hypervisor, "Running hypervisor"), " ")
	if copied(p.Status) == Underway {
		a.Migration = "active"
	}

	a.Pluggable, err = m.has("")
	if g.VM.Standby != "" {
		a.Primary = &a.Pluggable
	}

	for _, d := range x.Devices.Disks {
		if d.Source.File != "" {
			a.Disks = append(a.Disks, Disk{Path: d.Source.File})
		}
	}

	g.VM.CPU, g.VM.Words = x.CPU.Model, true
	if x.CPU.Mode == "host-passthrough" || x.CPU.Mode == "maximum" {
		g.VM.CPU = "host"
	}

	g.VM.Accel = map[string]string{"qemu": "tcg"}[x.Type]
	if g.VM.Memory == 0 && x.Memory.Unit == "KiB" {
		g.VM.Memory = x.Memory.Size << 10
	}

	return a, err
}
