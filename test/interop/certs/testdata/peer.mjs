// Node's TLS as a peer of ours. The argument is a file of rows; what is found
// goes to the standard output, one line each: what, kind, verdict.
import fs from 'node:fs';
import tls from 'node:tls';

const say = (...fields) => process.stdout.write(fields.join('\t').replaceAll('\n', ' ') + '\n');
const read = (file) => fs.readFileSync(file, 'utf8');
const rows = read(process.argv[2]).trimEnd().split('\n').map((line) => {
  const [kind, host, id, chain, key, root, port] = line.split('\t');
  return { kind, host, id, chain, key, root, port: Number(port) };
});

const uri = (certificate, id) => certificate.subjectaltname === `URI:${id}`;

function client(row) {
  const options = { port: row.port, host: '127.0.0.1', ca: read(row.root), minVersion: 'TLSv1.3' };
  if (row.host !== '') {
    Object.assign(options, { servername: row.host, ALPNProtocols: ['h2'] });
  } else {
    Object.assign(options, {
      cert: read(row.chain),
      key: read(row.key),
      checkServerIdentity: (_, certificate) =>
        uri(certificate, row.id) ? undefined : new Error(`the server is ${certificate.subjectaltname}`),
    });
  }
  return new Promise((resolve) => {
    let text = '';
    const socket = tls.connect(options, () => {
      if (row.host !== '') {
        text = `protocol ${socket.alpnProtocol}`;
        socket.end();
      }
    });
    socket.on('data', (data) => { text += data; });
    socket.on('error', (error) => { say('client', row.kind, `refused: ${error.code ?? ''} ${error.message}`); resolve(); });
    socket.on('end', () => socket.end());
    socket.on('close', (failed) => { if (!failed) say('client', row.kind, text.trim()); resolve(); });
  });
}

function serve(row) {
  const options = {
    cert: read(row.chain), key: read(row.key), ca: read(row.root),
    requestCert: true, rejectUnauthorized: true, minVersion: 'TLSv1.3',
  };
  const server = tls.createServer(options, (socket) => {
    socket.on('error', () => {});
    const certificate = socket.getPeerCertificate();
    socket.end(`peer ${uri(certificate, row.id) ? row.id : certificate.subjectaltname}\n`);
  });
  server.on('tlsClientError', () => {});
  server.listen(0, '127.0.0.1', () => say('listening', row.kind, server.address().port));
}

for (const row of rows.filter((r) => r.port !== 0)) {
  try { await client(row); } catch (error) { say('client', row.kind, `refused: ${error.message}`); }
}
for (const row of rows.filter((r) => r.id !== '' && r.key !== '')) {
  try { serve(row); } catch (error) { say('listening', row.kind, `refused: ${error.message}`); }
}
process.stdin.on('end', () => process.exit(0)).resume();
