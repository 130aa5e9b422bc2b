package cluster

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/meshca/meshca/test/testenv"
)

const (
	pauseImage   = "localhost/pause:1"
	coreDNSImage = "localhost/coredns:1"
)

// Image is what a container is made from: files of this machine, and what to run.
type Image struct {
	// Name is what pods call it, such as localhost/meshca:test.
	Name string
	// Files maps paths in the image to paths of files here.
	Files map[string]string
	// Entrypoint is the program with its first arguments.
	Entrypoint []string
	// User is uid:gid; empty means root.
	User string
}

// build makes the image, in the layout that docker save writes.
func (i Image) build(w io.Writer) error {
	layer, err := i.layer()
	if err != nil {
		return fmt.Errorf("making image %s: %w", i.Name, err)
	}
	image, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return fmt.Errorf("making image %s: %w", i.Name, err)
	}
	config, err := image.ConfigFile()
	if err != nil {
		return fmt.Errorf("making image %s: %w", i.Name, err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", runtime.GOARCH
	config.Config.Entrypoint, config.Config.User = i.Entrypoint, i.User
	config.Config.Env = []string{"PATH=/"}
	if image, err = mutate.ConfigFile(image, config); err != nil {
		return fmt.Errorf("making image %s: %w", i.Name, err)
	}
	tag, err := name.NewTag(i.Name)
	if err != nil {
		return err
	}
	return tarball.Write(tag, image, w)
}

// layer holds the files, with the directories above them; all belong to root and
// are of one date, so that equal content makes an equal image.
func (i Image) layer() (v1.Layer, error) {
	var buf bytes.Buffer
	out := tar.NewWriter(&buf)
	made := map[string]bool{".": true, "/": true}
	for _, to := range slices.Sorted(keysOf(i.Files)) {
		for _, dir := range parents(to) {
			if made[dir] {
				continue
			}
			made[dir] = true
			if err := out.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: time.Unix(0, 0)}); err != nil {
				return nil, err
			}
		}
		if err := addFile(out, strings.TrimPrefix(to, "/"), i.Files[to]); err != nil {
			return nil, err
		}
	}
	if err := out.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil },
		tarball.WithCompressionLevel(0))
}

func addFile(out *tar.Writer, to, from string) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	mode := fs.FileMode(0o644)
	if info.Mode()&0o111 != 0 {
		mode = 0o755
	}
	if err := out.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: to, Mode: int64(mode), Size: info.Size(), ModTime: time.Unix(0, 0)}); err != nil {
		return err
	}
	_, err = io.Copy(out, f)
	return err
}

func parents(path string) []string {
	var dirs []string
	for d := filepath.Dir(strings.TrimPrefix(path, "/")); d != "." && d != "/"; d = filepath.Dir(d) {
		dirs = append([]string{d}, dirs...)
	}
	return dirs
}

func keysOf(m map[string]string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// Import makes images and gives them to the node. A name that is taken means the
// new image from then on; running pods keep theirs.
func (c *Cluster) Import(ctx context.Context, images ...Image) error {
	for _, i := range images {
		file := filepath.Join(c.dir, "images", strings.NewReplacer("/", "_", ":", "_").Replace(i.Name)+".tar")
		out, err := os.Create(file)
		if err != nil {
			return err
		}
		err = i.build(out)
		if closeErr := out.Close(); err == nil {
			err = closeErr
		}
		if err == nil {
			err = c.ctr(ctx, "images", "import", "--all-platforms", file)
		}
		if rmErr := os.Remove(file); err == nil {
			err = rmErr
		}
		if err != nil {
			return fmt.Errorf("importing image %s: %w", i.Name, err)
		}
	}
	return nil
}

func (c *Cluster) ctr(ctx context.Context, args ...string) error {
	return run(ctx, "ctr", append([]string{"--address", filepath.Join(c.dir, "containerd.sock"), "--namespace", "k8s.io"}, args...)...)
}

func (c *Cluster) containerdReady(ctx context.Context) error { return c.ctr(ctx, "version") }

// importOwn gives the node what it needs itself.
func (c *Cluster) importOwn(ctx context.Context, cache *testenv.Cache) error {
	coredns, err := testenv.CoreDNS(ctx, cache)
	if err != nil {
		return err
	}
	pause, err := testenv.Build(ctx, filepath.Join(c.dir, "images"), "test/cluster", "./pause")
	if err != nil {
		return err
	}
	return c.Import(ctx,
		Image{Name: pauseImage, Files: map[string]string{"/pause": pause}, Entrypoint: []string{"/pause"}, User: "65534:65534"},
		Image{Name: coreDNSImage, Files: map[string]string{"/coredns": coredns}, Entrypoint: []string{"/coredns"}},
	)
}

// killTasks ends all containers; what of it fails, endShims makes good.
func (c *Cluster) killTasks(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if !c.Component("containerd").Running() {
		return
	}
	out, err := output(ctx, "ctr", "--address", filepath.Join(c.dir, "containerd.sock"), "--namespace", "k8s.io", "tasks", "list", "--quiet")
	if err != nil {
		c.say("listing containers: %v", err)
		return
	}
	for _, id := range strings.Fields(out) {
		if err := c.ctr(ctx, "tasks", "kill", "--signal", "SIGKILL", id); err != nil && ctx.Err() != nil {
			c.say("ending container %s: %v", id, err)
		}
	}
}
