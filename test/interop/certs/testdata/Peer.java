// Java's TLS and path validation as a peer of ours. The argument is a file of
// rows; what is found goes to the standard output, one line each: what, kind,
// verdict.

import java.io.BufferedReader;
import java.io.FileInputStream;
import java.io.InputStreamReader;
import java.net.InetAddress;
import java.net.Socket;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.KeyFactory;
import java.security.KeyStore;
import java.security.PrivateKey;
import java.security.cert.Certificate;
import java.security.cert.CertPathValidator;
import java.security.cert.CertificateFactory;
import java.security.cert.PKIXParameters;
import java.security.cert.TrustAnchor;
import java.security.cert.X509Certificate;
import java.security.spec.PKCS8EncodedKeySpec;
import java.util.ArrayList;
import java.util.Base64;
import java.util.List;
import java.util.Set;
import javax.net.ssl.KeyManagerFactory;
import javax.net.ssl.SSLContext;
import javax.net.ssl.SSLParameters;
import javax.net.ssl.SSLServerSocket;
import javax.net.ssl.SSLSession;
import javax.net.ssl.SSLSocket;
import javax.net.ssl.TrustManagerFactory;

public class Peer {
  record Row(String kind, String host, String id, String chain, String key, String root, int port) {}

  static final char[] PASSWORD = "in memory".toCharArray();

  static synchronized void say(Object... fields) {
    StringBuilder line = new StringBuilder();
    for (Object f : fields) {
      line.append(line.isEmpty() ? "" : "\t").append(String.valueOf(f).replace('\n', ' '));
    }
    System.out.println(line);
    System.out.flush();
  }

  static List<X509Certificate> certificates(String file) throws Exception {
    List<X509Certificate> all = new ArrayList<>();
    try (FileInputStream in = new FileInputStream(file)) {
      for (Certificate c : CertificateFactory.getInstance("X.509").generateCertificates(in)) {
        all.add((X509Certificate) c);
      }
    }
    return all;
  }

  static PrivateKey key(String file, String algorithm) throws Exception {
    String body = Files.readString(Path.of(file)).replaceAll("-----[A-Z ]+-----|\\s", "");
    return KeyFactory.getInstance(algorithm).generatePrivate(new PKCS8EncodedKeySpec(Base64.getDecoder().decode(body)));
  }

  static SSLContext context(Row row) throws Exception {
    KeyStore trust = KeyStore.getInstance("PKCS12");
    trust.load(null, null);
    trust.setCertificateEntry("root", certificates(row.root).get(0));
    TrustManagerFactory believed = TrustManagerFactory.getInstance("PKIX");
    believed.init(trust);
    KeyManagerFactory shown = KeyManagerFactory.getInstance("PKIX");
    KeyStore own = KeyStore.getInstance("PKCS12");
    own.load(null, null);
    if (row.host.isEmpty()) {
      List<X509Certificate> chain = certificates(row.chain);
      PrivateKey key = key(row.key, chain.get(0).getPublicKey().getAlgorithm());
      own.setKeyEntry("svid", key, PASSWORD, chain.toArray(new Certificate[0]));
    }
    shown.init(own, PASSWORD);
    SSLContext context = SSLContext.getInstance("TLSv1.3");
    context.init(shown.getKeyManagers(), believed.getTrustManagers(), null);
    return context;
  }

  // The one URI among the peer's names.
  static String uri(SSLSession session) throws Exception {
    X509Certificate peer = (X509Certificate) session.getPeerCertificates()[0];
    String found = "";
    for (List<?> name : peer.getSubjectAlternativeNames()) {
      found += name.get(0).equals(6) ? (String) name.get(1) : "another name";
    }
    return found;
  }

  static void path(Row row) throws Exception {
    PKIXParameters parameters = new PKIXParameters(Set.of(new TrustAnchor(certificates(row.root).get(0), null)));
    parameters.setRevocationEnabled(false);
    CertPathValidator.getInstance("PKIX")
        .validate(CertificateFactory.getInstance("X.509").generateCertPath(certificates(row.chain)), parameters);
  }

  static String client(Row row) throws Exception {
    Socket raw = new Socket(InetAddress.getLoopbackAddress(), row.port);
    raw.setSoTimeout(20_000);
    try (SSLSocket s = (SSLSocket) context(row).getSocketFactory().createSocket(raw, row.host, row.port, true)) {
      SSLParameters parameters = s.getSSLParameters();
      parameters.setProtocols(new String[] {"TLSv1.3"});
      if (!row.host.isEmpty()) {
        parameters.setEndpointIdentificationAlgorithm("HTTPS");
        parameters.setApplicationProtocols(new String[] {"h2"});
      }
      s.setSSLParameters(parameters);
      s.startHandshake();
      if (!row.host.isEmpty()) {
        return "protocol " + s.getApplicationProtocol();
      }
      String peer = uri(s.getSession());
      if (!peer.equals(row.id)) {
        throw new Exception("the server is " + peer);
      }
      return new BufferedReader(new InputStreamReader(s.getInputStream())).readLine();
    }
  }

  static SSLServerSocket listen(Row row) throws Exception {
    SSLServerSocket l = (SSLServerSocket)
        context(row).getServerSocketFactory().createServerSocket(0, 10, InetAddress.getLoopbackAddress());
    l.setEnabledProtocols(new String[] {"TLSv1.3"});
    l.setNeedClientAuth(true);
    Thread t = new Thread(() -> {
      while (true) {
        try (SSLSocket s = (SSLSocket) l.accept()) {
          s.startHandshake();
          s.getOutputStream().write(("peer " + uri(s.getSession()) + "\n").getBytes(StandardCharsets.UTF_8));
          s.getOutputStream().flush();
          s.getInputStream().read();
        } catch (Exception e) {
          // The client sees the alert.
        }
      }
    });
    t.setDaemon(true);
    t.start();
    return l;
  }

  interface Step { String run() throws Exception; }

  static void attempt(String what, Row row, Step step) {
    try {
      say(what, row.kind, step.run());
    } catch (Exception e) {
      say(what, row.kind, "refused: " + e);
    }
  }

  public static void main(String[] args) throws Exception {
    List<Row> rows = new ArrayList<>();
    for (String line : Files.readAllLines(Path.of(args[0]))) {
      String[] f = line.split("\t", -1);
      rows.add(new Row(f[0], f[1], f[2], f[3], f[4], f[5], Integer.parseInt(f[6])));
    }
    for (Row row : rows) {
      attempt("path", row, () -> { path(row); return "ok"; });
      if (row.port != 0) {
        attempt("client", row, () -> client(row));
      }
      if (!row.id.isEmpty() && !row.key.isEmpty()) {
        attempt("listening", row, () -> String.valueOf(listen(row).getLocalPort()));
      }
    }
    System.in.read();
  }
}
