"""Python's ssl as a peer of ours. The argument is a file of rows; what is found
goes to the standard output, one line each: what, kind, verdict."""

import socket
import ssl
import sys
import threading


def say(*fields):
    print("\t".join(str(f).replace("\n", " ") for f in fields), flush=True)


def names(certificate, kind):
    return [value for key, value in certificate["subjectAltName"] if key == kind]


def context(row, side):
    c = ssl.SSLContext(side)
    c.minimum_version = ssl.TLSVersion.TLSv1_3
    c.check_hostname = row["host"] != ""
    c.verify_mode = ssl.CERT_REQUIRED
    c.verify_flags |= ssl.VERIFY_X509_STRICT
    c.load_verify_locations(row["root"])
    if row["host"] == "":
        c.load_cert_chain(row["chain"], row["key"])
    else:
        c.set_alpn_protocols(["h2"])
    return c


def client(row):
    raw = socket.create_connection(("127.0.0.1", row["port"]), timeout=20)
    with context(row, ssl.PROTOCOL_TLS_CLIENT).wrap_socket(raw, server_hostname=row["host"] or None) as s:
        if row["host"]:
            return "protocol " + s.selected_alpn_protocol()
        if names(s.getpeercert(), "URI") != [row["id"]]:
            raise ValueError("the server is " + str(s.getpeercert()))
        return s.makefile().readline().strip()


def serve(row, listener):
    c = context(row, ssl.PROTOCOL_TLS_SERVER)
    while True:
        raw, _ = listener.accept()
        try:
            with c.wrap_socket(raw, server_side=True) as s:
                s.sendall(("peer " + ",".join(names(s.getpeercert(), "URI")) + "\n").encode())
                s.recv(100)
        except OSError:
            pass


def main():
    rows = []
    for line in open(sys.argv[1]):
        row = dict(zip(("kind", "host", "id", "chain", "key", "root", "port"), line.rstrip("\n").split("\t")))
        row["port"] = int(row["port"])
        rows.append(row)
    for row in rows:
        if row["port"]:
            try:
                say("client", row["kind"], client(row))
            except Exception as e:
                say("client", row["kind"], "refused: " + str(e))
    for row in rows:
        if row["id"] and row["key"]:
            listener = socket.create_server(("127.0.0.1", 0))
            threading.Thread(target=serve, args=(row, listener), daemon=True).start()
            say("listening", row["kind"], listener.getsockname()[1])
    sys.stdin.read()


main()
