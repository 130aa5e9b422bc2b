# The commands that people type. CI runs .ci/run, which calls these.

GO   = go
TOOL = $(GO) tool -modfile=tools/go.mod

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

# gRPC's request tracing, which nobody can reach here, would bring HTML templates
# into every program: a quarter of their size, and 3 MB of memory.
.PHONY: build
build: ## meshca, agent and proxy, static, into bin/
	@CGO_ENABLED=0 $(GO) build -trimpath -tags grpcnotrace -o bin/ ./cmd/meshca ./cmd/agent ./cmd/proxy

.PHONY: demo
demo: ## the whole path in one process; ARGS=--stay keeps it up
	@echo "building meshca (about a minute the first time)" >&2
	@$(GO) run ./cmd/meshca demo $(ARGS)

.PHONY: test
test: ## unit tests, then tests against real Envoy, Kubernetes and others
	@$(GO) test -timeout 5m $(TESTFLAGS) ./...
	@$(GO) run ./test/testenv/fetch >/dev/null
	@$(MAKE) --no-print-directory build # which tests do too, within their time
	@cd test/interop && $(GO) test -timeout 5m $(TESTFLAGS) ./...
	@cd test/bench && $(GO) test -timeout 5m $(TESTFLAGS) ./...

.PHONY: race
race: ## the same under the race detector, which needs a C compiler
	@$(MAKE) --no-print-directory test TESTFLAGS="-race $(TESTFLAGS)"

.PHONY: cluster-up
cluster-up: ## a real Kubernetes of one node on this machine; needs root, containerd, runc and CNI plugins
	@$(GO) run ./test/testenv/fetch kubernetes node coredns >/dev/null
	@cd test/cluster && $(GO) run ./cmd/cluster up

.PHONY: cluster-down
cluster-down: ## take it away again
	@cd test/cluster && $(GO) run ./cmd/cluster down

.PHONY: e2e
e2e: ## meshca in such a cluster, made anew, as users install it; the cluster stays up
	@$(GO) run ./test/testenv/fetch kubernetes node coredns envoy >/dev/null
	@cd test/cluster && $(GO) test -count=1 -timeout 20m -skip '$(WITH_VAULT)' $(TESTFLAGS) ./...

# Tests of an installation whose root is in Vault.
WITH_VAULT = ^TestVaultSigns$$|^TestF44_VaultSealed$$

.PHONY: e2e-vault
e2e-vault: ## the same with a real Vault that holds the root, for what depends on that
	@$(GO) run ./test/testenv/fetch kubernetes node coredns envoy vault >/dev/null
	@cd test/cluster && E2E_UPSTREAM=vault $(GO) test -count=1 -timeout 10m -run '^TestFirstSVIDInAPod$$|^TestEnvoyInAPod$$|$(WITH_VAULT)' $(TESTFLAGS) ./e2e

.PHONY: faults
faults: ## what takes minutes: floods, shortages, flapping policies and apps
	@$(GO) test -tags faults -v -count=1 -timeout 15m -run '^TestLong_' $(TESTFLAGS) ./proxy

.PHONY: lint
lint: ## gofmt, go vet, staticcheck, and govulncheck where its database can be reached
	@test/ci/lint

.PHONY: fuzz
fuzz: ## every fuzz target for 30 s, or FUZZTIME=5m
	@test/ci/fuzz $(or $(FUZZTIME),30s)

.PHONY: mutants
mutants: ## switch off each control and want a test to notice; ARGS="-area ca -id T6"
	@$(GO) run ./test/mutants $(ARGS)

.PHONY: conformance
conformance: ## write docs/conformance.md anew
	@$(GO) test ./test/conformance -run TestPageIsFresh -update

.PHONY: generate
generate: ## write generated code and reference pages anew
	@$(TOOL) buf generate
	@deploy/render
	@$(GO) test ./cmd/meshca ./cmd/agent ./cmd/proxy ./cmd/meshca/findings -run 'TestReference|TestPageIsCurrent' -update

.PHONY: bench
bench: ## what whole programs cost, beside goals and peers, into docs/benchmarks.md; ARGS="-only issuing"
	@$(GO) run ./test/testenv/fetch envoy kubernetes >/dev/null
	@cd test/bench && $(GO) run . $(ARGS)

.PHONY: bench-quick
bench-quick: ## the same in a few minutes, to see that all of it runs
	@$(GO) run ./test/testenv/fetch envoy kubernetes >/dev/null
	@cd test/bench && $(GO) run . -quick $(ARGS)

.PHONY: bench-functions
bench-functions: ## Go's benchmarks of single functions
	@$(GO) test -run '^$$' -bench . -benchmem $(ARGS) $$($(GO) list ./... | grep -v /test/)
