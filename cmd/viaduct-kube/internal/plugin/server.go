package plugin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	kubelet "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

// look is how often it is seen whether the kubelet has started again: then it has forgotten its plugins, and removed
// their sockets.
const look = time.Second

// Serve serves the plugin in the kubelet's folder until the context ends, and registers it whenever the kubelet has
// started. It returns nil when the context has ended.
func (p *Plugin) Serve(ctx context.Context, dir string) error {
	for ctx.Err() == nil {
		if err := p.serveOnce(ctx, dir); err != nil && ctx.Err() == nil {
			p.Tell(true, "RegisterFailed", err.Error())
		}
		pause(ctx)
	}
	return nil
}

func pause(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-time.After(look):
	}
}

// serveOnce serves until the kubelet that it has registered with is another one.
func (p *Plugin) serveOnce(ctx context.Context, dir string) error {
	own := filepath.Join(dir, p.Domain+"-"+p.Pool+".sock")
	theirs := filepath.Join(dir, filepath.Base(kubelet.KubeletSocket))
	registered, err := os.Stat(theirs)
	if errors.Is(err, fs.ErrNotExist) {
		// Which it is when the kubelet starts.
		return nil
	}
	if err != nil {
		return err
	}
	if err := os.Remove(own); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	listener, err := net.Listen("unix", own)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	kubelet.RegisterDevicePluginServer(server, p)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	defer server.Stop()

	if err := p.register(ctx, theirs, filepath.Base(own)); err != nil {
		return fmt.Errorf("register %s with the kubelet: %w", p.Resource(), err)
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-ended:
			return err
		case <-time.After(look):
		}
		now, err := os.Stat(theirs)
		// A file system may give a new socket the number of the one that has gone.
		if _, gone := os.Lstat(own); err != nil || gone != nil || !os.SameFile(now, registered) ||
			!now.ModTime().Equal(registered.ModTime()) {
			return nil
		}
	}
}

func (p *Plugin) register(ctx context.Context, socket, endpoint string) error {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	options, _ := p.GetDevicePluginOptions(ctx, nil)
	_, err = kubelet.NewRegistrationClient(conn).Register(ctx, &kubelet.RegisterRequest{
		Version: kubelet.Version, Endpoint: endpoint, ResourceName: p.Resource(), Options: options,
	})
	return err
}
