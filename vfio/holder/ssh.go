package holder

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"net"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/internal/netlink"
	"viaduct/iommu"
)

// connection is one of TCP.
type connection struct{ local, peer net.IP }

// readPeers adds whom the host has ssh connections with, by the interface that leads there.
func (n *interfaces) readPeers(h *iommu.Host, c *netlink.Conn, addrs []netlink.Address) error {
	peers, err := sshPeers(h)
	if err != nil && !errors.Is(err, ErrBlind) {
		return err
	}

	for _, p := range peers {
		var over []int
		if p.peer.IsLinkLocalUnicast() {
			// It is behind the interface with the connection's own address, whatever the routes.
			for _, a := range addrs {
				if a.IP.Equal(p.local) {
					over = append(over, a.Index)
				}
			}
		} else {
			var err error
			if over, err = c.RouteTo(p.peer, p.local); err != nil && !noWay(err) {
				return err
			}
		}
		for _, index := range over {
			n.ssh[index] = append(n.ssh[index], p.peer.String())
		}
	}
	return err
}

// noWay reports whether an error says that there is no route, or one that forbids (fib_props of
// net/ipv4/fib_semantics.c): then a connection that would need one is dead already.
func noWay(err error) bool {
	for _, errno := range []unix.Errno{unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EINVAL} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// sshPeers are the established connections that an ssh server has: of any user, through sudo, tmux and whatever else
// loses the environment variable that names one.
func sshPeers(h *iommu.Host) ([]connection, error) {
	// By socket.
	all := map[string]connection{}
	for _, file := range []string{"proc/self/net/tcp", "proc/self/net/tcp6"} {
		b, err := h.Read(file)
		if host.Absent(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		parseTCP(b, all)
	}
	if len(all) == 0 {
		return nil, nil
	}

	pids, err := processes(h)
	if err != nil {
		return nil, err
	}
	var out []connection
	var blind error
	for _, pid := range pids {
		name, err := h.String(path.Join("proc", pid, "comm"))
		if err = unseenOf(h, pid, path.Join("proc", pid), err); errors.Is(err, ErrBlind) {
			blind = err
		} else if err != nil {
			return nil, err
		}
		if !strings.HasPrefix(name, "sshd") && name != "dropbear" {
			continue
		}
		found, err := connectionsOf(h, pid, all)
		if errors.Is(err, ErrBlind) {
			blind = err
		} else if err != nil {
			return nil, err
		}
		for _, c := range found {
			if !slices.ContainsFunc(out,
				func(o connection) bool { return o.local.Equal(c.local) && o.peer.Equal(c.peer) }) {
				out = append(out, c)
			}
		}
	}
	return out, blind
}

// connectionsOf are the connections, by their sockets, that a process has.
func connectionsOf(h *iommu.Host, pid string, all map[string]connection) ([]connection, error) {
	dir := path.Join("proc", pid, "fd")
	fds, err := h.Names(dir)
	if err != nil {
		return nil, unseenOf(h, pid, dir, err)
	}

	var out []connection
	for _, fd := range fds {
		target, err := h.Link(path.Join(dir, fd))
		if err != nil {
			if err = unseenOf(h, pid, dir, err); err != nil {
				return out, err
			}
			continue
		}
		inode, _ := strings.CutPrefix(target, "socket:[")
		if c, ok := all[strings.TrimSuffix(inode, "]")]; ok {
			out = append(out, c)
		}
	}
	return out, nil
}

// parseTCP adds the established connections in a /proc/net/tcp or tcp6, by their sockets' inodes
// (Documentation/networking/proc_net_tcp.rst).
func parseTCP(b []byte, all map[string]connection) {
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 10 || f[3] != "01" || f[9] == "0" {
			continue
		}
		local, ok1 := parseIP(f[1])
		peer, ok2 := parseIP(f[2])
		if _, err := strconv.ParseUint(f[9], 10, 64); err == nil && ok1 && ok2 {
			all[f[9]] = connection{local, peer}
		}
	}
}

// parseIP reads ADDRESS:PORT, the address in words of the machine's order.
func parseIP(s string) (net.IP, bool) {
	address, _, _ := strings.Cut(s, ":")
	raw, err := hex.DecodeString(address)
	if err != nil || (len(raw) != 4 && len(raw) != 16) {
		return nil, false
	}
	for i := 0; i < len(raw); i += 4 {
		binary.NativeEndian.PutUint32(raw[i:], binary.BigEndian.Uint32(raw[i:]))
	}
	return net.IP(raw), true
}
