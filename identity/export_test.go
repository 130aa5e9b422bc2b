package identity

// SANURIs lets tests feed the parser what crypto/x509 would not let through.
var SANURIs = sanURIs
