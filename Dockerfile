# The images: docker build --target meshca, meshca-agent or meshca-proxy. Each is one
# static program and nothing else.
FROM golang:1.26.8 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
RUN CGO_ENABLED=0 go build -trimpath -tags grpcnotrace -ldflags="-s -w" -o /out/ ./cmd/meshca ./cmd/agent ./cmd/proxy

FROM scratch AS meshca
COPY --from=build /out/meshca /meshca
USER 65532:65532
ENTRYPOINT ["/meshca"]

# Root without capabilities: the kubelet's directories belong to root.
FROM scratch AS meshca-agent
COPY --from=build /out/agent /agent
ENTRYPOINT ["/agent"]

FROM scratch AS meshca-proxy
COPY --from=build /out/proxy /proxy
USER 15006:15006
ENTRYPOINT ["/proxy"]
