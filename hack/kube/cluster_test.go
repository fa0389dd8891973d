//go:build lab

// Package kube holds the proofs that need a cluster: etcd, the API server, scheduler, controllers, a kubelet and
// containerd, all of them real. The node is a host of the lab (hack/lab), where the tests run; the control plane is in
// namespaces of the machine that emulates it, where it is ten times as fast, and is reached by a pipe that QEMU makes.
// What needs no device has both there. `hack/kube/run` runs all of it. Nothing listens beyond a loopback interface.
package kube

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

const (
	node    = "lab"
	service = "10.96.0.1"                       // the API server's address, for pods too
	state   = "/var/lib/viaduct-kube-lab"       // all that outlives a boot
	socket  = "/run/containerd/containerd.sock" // containerd's
)

// A part of the cluster is what one process starts.
const (
	whole   = ""        // on one machine, without devices
	control = "control" // all but the node
	nodes   = "node"
	pipe    = "pipe" // one connection of the node's to the API server
)

var (
	part = os.Getenv("KUBE_PART")
	// shared is the folder that the control plane shares with the machine that it is on.
	shared = os.Getenv("KUBE_SHARED")
	logs   = cmp.Or(os.Getenv("KUBE_LOGS"), state+"/log")
)

// nodeIP is the node's address: on the loopback interface, or on the network card that QEMU has the pipe for.
func nodeIP() string {
	if part == nodes {
		return "10.96.0.15"
	}
	return "10.99.0.1"
}

// programs is the folder with the programs, which hack/kube/run puts there.
var programs = os.Getenv("KUBE_PROGRAMS")

// patience is how long anything may take: the host is emulated, and its machine may be busy.
const patience = 6 * time.Minute

// The users whose tokens the API server knows, and their groups: each component is what the role of that name allows.
var users = map[string]string{
	"admin":                          "system:masters",
	"system:kube-scheduler":          "",
	"system:kube-controller-manager": "",
	"system:node:" + node:            "system:nodes",
}

// A cluster is what runs of it, and the administrator's ways to it.
type cluster struct {
	etcd, api, scheduler, controllers, containerd, kubelet, driver *process

	config  *rest.Config
	client  kubernetes.Interface
	objects dynamic.Interface
}

// up is the cluster that the tests share.
var up *cluster

func TestMain(m *testing.M) {
	os.Exit(func() int {
		if part == pipe {
			return dial()
		}
		up = &cluster{}
		defer up.stop()
		if err := up.start(); err != nil {
			fmt.Fprintf(os.Stderr, "the cluster does not come up: %v\n%s", err, up.whatTheySay())
			return 1
		}
		if part == control {
			return relay()
		}
		return m.Run()
	}())
}

// A step is one of those to a cluster.
type step struct {
	what string
	do   func() error
}

// start starts this part of it. With the node, a pod can be made when it returns.
func (c *cluster) start() error {
	began := time.Now()
	told := func(what string) { fmt.Printf("cluster: %s after %.1f s\n", what, time.Since(began).Seconds()) }
	for _, dir := range []string{logs, state + "/certificates", state + "/cni", "/var/run/cdi"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	steps := []step{{"host", c.ground}}
	if part != nodes {
		steps = append(steps, step{"etcd", c.startStore}, step{"API server", c.startAPI},
			step{"scheduler and controllers", c.startControl})
	}
	if part != control {
		steps = append(steps, step{"declared host", c.declared}, step{"connection", c.connect},
			step{"containerd", c.startRuntime}, step{"kubelet", c.startKubelet}, step{"node", c.nodeReady})
	}
	for _, step := range steps {
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: %w", step.what, err)
		}
		told(step.what)
	}
	return nil
}

// stop ends what runs, the kubelet first.
func (c *cluster) stop() {
	for _, p := range []*process{c.kubelet, c.containerd, c.scheduler, c.controllers, c.api, c.etcd} {
		if p != nil {
			p.end(syscall.SIGKILL)
		}
	}
}

func (c *cluster) whatTheySay() string {
	var b strings.Builder
	for _, p := range []*process{c.etcd, c.api, c.scheduler, c.controllers, c.containerd, c.kubelet} {
		if p != nil {
			fmt.Fprintf(&b, "--- %s (runs: %t)\n%s\n", p.name, p.alive(), lastLines(p.name, 25))
		}
	}
	return b.String()
}

// ground makes the host one that a cluster can run on. The control plane's network has a loopback interface alone,
// which gets the service's address and the node's.
func (c *cluster) ground() error {
	lines := []string{
		"mountpoint -q /sys/fs/cgroup || mount -t cgroup2 cgroup /sys/fs/cgroup",
		"mount --make-rshared /", // as systemd does; mounts are handed to pods and back
	}
	if part == nodes {
		lines = append(lines, "cp ca.crt "+certificate,
			"card=$(ip -brief link | awk '/52:54:00:00:09:01/ { print $1 }'); ip link set $card up && "+
				"ip address replace "+nodeIP()+"/24 dev $card")
	} else {
		lines = append(lines, "ip address replace "+service+"/32 dev lo", "ip address replace "+nodeIP()+"/32 dev lo")
	}
	for _, line := range lines {
		if out, err := exec.Command("sh", "-c", line).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", line, err, out)
		}
	}
	return nil
}

// declared does what a boot does before the kubelet starts: the host is made what was declared of it, if something was.
func (c *cluster) declared() error {
	if _, err := os.Stat("/etc/viaduct/host.yaml"); err != nil {
		return nil
	}
	for _, line := range [][]string{{viaduct, "apply"}, {driver, "cdi"}} {
		if out, err := exec.Command(line[0], line[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%v: %w: %s", line, err, out)
		}
	}
	return nil
}

func (c *cluster) startStore() (err error) {
	c.etcd, err = begin("etcd", nil, programs+"/cluster", "etcd", "--data-dir="+state+"/etcd", "--unsafe-no-fsync",
		"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
		"--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380",
		"--initial-cluster=default=http://127.0.0.1:2380", "--log-level=warn")
	if err != nil {
		return err
	}
	return until("etcd listens", c.etcd, func() error {
		conn, err := net.Dial("tcp", "127.0.0.1:2379")
		if err == nil {
			_ = conn.Close()
		}
		return err
	})
}

func (c *cluster) startAPI() (err error) {
	key, tokens := state+"/service-account.key", state+"/tokens"
	if err := makeKey(key); err != nil {
		return err
	}
	var list strings.Builder
	for user, group := range users {
		fmt.Fprintf(&list, "%s,%s,%s,%q\n", token(user), user, user, group)
	}
	if err := os.WriteFile(tokens, []byte(list.String()), 0o600); err != nil {
		return err
	}
	c.api, err = begin("kube-apiserver", nil, programs+"/cluster", "kube-apiserver",
		"--etcd-servers=http://127.0.0.1:2379", "--bind-address="+service, "--secure-port=443",
		"--advertise-address="+nodeIP(), "--endpoint-reconciler-type=none", "--service-cluster-ip-range=10.96.0.0/24",
		"--cert-dir="+state+"/certificates", "--token-auth-file="+tokens, "--authorization-mode=Node,RBAC",
		"--enable-admission-plugins=NodeRestriction", "--allow-privileged=true", "--profiling=false",
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-signing-key-file="+key,
		"--service-account-key-file="+key)
	if err != nil {
		return err
	}
	if err := until("the API server makes its certificate", c.api, func() error {
		_, err := os.Stat(certificate)
		return err
	}); err != nil {
		return err
	}
	return c.connect()
}

// certificate is the API server's, with the authority that it made itself.
const certificate = state + "/certificates/apiserver.crt"

func (c *cluster) connect() (err error) {
	file, err := kubeconfig("admin")
	if err != nil {
		return err
	}
	if c.config, err = clientcmd.BuildConfigFromFlags("", file); err != nil {
		return err
	}
	c.config.QPS, c.config.Burst = 500, 1000
	if c.client, err = kubernetes.NewForConfig(c.config); err != nil {
		return err
	}
	if c.objects, err = dynamic.NewForConfig(c.config); err != nil {
		return err
	}
	return until("the API server is ready", c.api, func() error {
		return c.client.Discovery().RESTClient().Get().AbsPath("/readyz").Do(context.Background()).Error()
	})
}

func (c *cluster) startControl() error {
	scheduler, err := kubeconfig("system:kube-scheduler")
	if err != nil {
		return err
	}
	controllers, err := kubeconfig("system:kube-controller-manager")
	if err != nil {
		return err
	}
	c.scheduler, err = begin("kube-scheduler", nil, programs+"/cluster", "kube-scheduler", "--kubeconfig="+scheduler,
		"--leader-elect=false", "--bind-address=127.0.0.1")
	if err != nil {
		return err
	}
	c.controllers, err = begin("kube-controller-manager", nil, programs+"/cluster", "kube-controller-manager",
		"--kubeconfig="+controllers, "--leader-elect=false", "--bind-address=127.0.0.1",
		"--use-service-account-credentials", "--service-account-private-key-file="+state+"/service-account.key",
		"--root-ca-file="+certificate)
	return err
}

func (c *cluster) startRuntime() (err error) {
	config := fmt.Sprintf(runtimeConfig, state, state, programs)
	if err := os.WriteFile(state+"/containerd.toml", []byte(config), 0o644); err != nil {
		return err
	}
	if err := os.WriteFile(state+"/cni/10-none.conflist", []byte(noNetwork), 0o644); err != nil {
		return err
	}
	c.containerd, err = begin("containerd", []string{"PATH=" + programs + ":" + os.Getenv("PATH")},
		programs+"/containerd", "--config", state+"/containerd.toml", "--log-level", "warn")
	if err != nil {
		return err
	}
	if err := until("containerd listens", c.containerd, func() error {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			_ = conn.Close()
		}
		return err
	}); err != nil {
		return err
	}
	return loadImage(image, podFiles(), "/bin/sleep", "2000000000")
}

func (c *cluster) startKubelet() error {
	config, err := kubeconfig("system:node:" + node)
	if err != nil {
		return err
	}
	text := fmt.Appendf(nil, kubeletConfig, cmp.Or(os.Getenv("KUBE_CGROUP"), "/"), socket, socket)
	if err := os.WriteFile(state+"/kubelet.yaml", text, 0o644); err != nil {
		return err
	}
	c.kubelet, err = begin("kubelet", nil, programs+"/cluster", "kubelet", "--kubeconfig="+config,
		"--config="+state+"/kubelet.yaml", "--hostname-override="+node, "--node-ip="+nodeIP())
	return err
}

// token is the secret of a user that the API server knows; it is one only for this loopback interface.
func token(user string) string { return "token-of-" + strings.ReplaceAll(user, ":", "-") }

// kubeconfig writes the file with which a program is that user.
func kubeconfig(user string) (string, error) { return kubeconfigFor(user, token(user)) }

func kubeconfigFor(user, token string) (string, error) {
	file := filepath.Join(state, strings.ReplaceAll(user, ":", "-")+".kubeconfig")
	return file, os.WriteFile(file, fmt.Appendf(nil, kubeconfigText, certificate, service, token), 0o600)
}

func makeKey(file string) error {
	if _, err := os.Stat(file); err == nil {
		return nil
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	b := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})
	return os.WriteFile(file, b, 0o600)
}

// until asks again until there is no error, for as long as the process lives, if there is one. It is for what tells
// nobody when it is so.
func until(what string, p *process, ask func() error) error {
	var err error
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	late := time.After(patience)
	var ended chan struct{}
	if p != nil {
		ended = p.ended
	}
	for {
		if err = ask(); err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ended:
			return fmt.Errorf("%s has ended: %s", p.name, p.cmd.ProcessState)
		case <-late:
			return fmt.Errorf("waited %s until %s: %w", patience, what, err)
		}
	}
}
