# The commands that people type. CI runs .ci/run, which calls these.

GO   = go
TOOL = $(GO) tool -modfile=tools/go.mod

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 20

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
	@cd test/interop && $(GO) test -timeout 5m $(TESTFLAGS) ./...

.PHONY: race
race: ## the same under the race detector, which needs a C compiler
	@$(MAKE) --no-print-directory test TESTFLAGS="-race $(TESTFLAGS)"

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
	@$(GO) test ./cmd/meshca ./cmd/agent ./cmd/proxy -run TestReference -update

.PHONY: bench
bench: ## benchmarks of the root module
	@$(GO) test -run '^$$' -bench . -benchmem $(ARGS) $$($(GO) list ./... | grep -v /test/)
