#!/bin/sh
# Sets a Vault up for meshca: a PKI mount with a root that never leaves Vault, the
# policy that lets a CA have intermediates signed and nothing else, and the ways to log
# in. It may be run again at any time: what is there stays, and the policy and the roles
# become what is said here. docs/vault.md explains each part.
#
#   setup.sh [pki] [policy] [kubernetes] [approle]    these parts; without any: pki policy
#   setup.sh show-policy                              prints the policy, changes nothing
#
# It needs the vault command, and VAULT_ADDR, VAULT_CACERT and a VAULT_TOKEN that may do
# all this. The rest is said by the variables below.
set -eu

: "${TRUST_DOMAIN:=cluster.local}"
: "${INTERMEDIATE_LIFETIME:=72h}" # as intermediate_lifetime in meshca's configuration: 72h, 1h30m, 90s
: "${PKI_MOUNT:=pki}"
: "${ISSUER:=meshca}"
: "${ROOT_LIFETIME:=87600h}"
: "${ROOT_FILE:=}" # where to put the root's certificate, for roots_file; nowhere if empty
: "${POLICY:=meshca}"
: "${TOKEN_LIFETIME:=1h}"
: "${TOKEN_MAX_LIFETIME:=24h}"

: "${KUBERNETES_MOUNT:=kubernetes}"
: "${KUBERNETES_ROLE:=meshca}"
: "${KUBERNETES_HOST:=https://kubernetes.default.svc}" # as Vault reaches it
: "${KUBERNETES_CA_FILE:=}"  # its authorities; empty where Vault runs in the cluster
: "${REVIEWER_TOKEN_FILE:=}" # of a ServiceAccount with system:auth-delegator; empty where Vault runs in the cluster
: "${NAMESPACE:=meshca-system}"
: "${SERVICE_ACCOUNT:=meshca}"
: "${AUDIENCE:=vault}"

: "${APPROLE_MOUNT:=approle}"
: "${APPROLE_ROLE:=meshca}"
: "${SECRET_ID_LIFETIME:=24h}"
: "${SECRET_ID_USES:=10}"

# A name with one of Vault's globs or templates in it would allow more than it says.
literal() {
	case $2 in
	'' | *[!A-Za-z0-9._/-]*) echo "setup.sh: $1 is \"$2\"; want letters, digits and . _ / - only" >&2 && exit 2 ;;
	esac
}
for name in TRUST_DOMAIN INTERMEDIATE_LIFETIME PKI_MOUNT ISSUER POLICY KUBERNETES_MOUNT KUBERNETES_ROLE NAMESPACE SERVICE_ACCOUNT AUDIENCE APPROLE_MOUNT APPROLE_ROLE; do
	eval "literal $name \"\$$name\""
done
if [ "$ISSUER" = default ]; then
	echo 'setup.sh: ISSUER must not be "default", which is whichever the default is at the time' >&2
	exit 2
fi

# No role stands between this path and the root's key: the parameters are the only fence.
# To Vault an empty value is allowed whatever the list of allowed ones says, and means
# its default, such as a ttl of 768h; so it has to be denied.
show_policy() {
	cat <<END
path "$PKI_MOUNT/issuer/$ISSUER/sign-intermediate" {
  capabilities = ["update"]
  required_parameters = ["csr", "format", "use_csr_values", "common_name", "organization", "serial_number", "exclude_cn_from_sans", "uri_sans", "max_path_length", "key_usage", "ttl", "not_before_duration", "enforce_leaf_not_after_behavior"]
  allowed_parameters = {
    "csr"                             = []
    "format"                          = ["pem"]
    "use_csr_values"                  = ["false"]
    "common_name"                     = ["meshca intermediate"]
    "organization"                    = ["$TRUST_DOMAIN"]
    "serial_number"                   = []
    "exclude_cn_from_sans"            = ["true"]
    "uri_sans"                        = ["spiffe://$TRUST_DOMAIN"]
    "max_path_length"                 = ["0"]
    "key_usage"                       = ["CertSign,CRLSign"]
    "ttl"                             = ["$INTERMEDIATE_LIFETIME"]
    "not_before_duration"             = ["2m"]
    "enforce_leaf_not_after_behavior" = ["false"]
  }
  denied_parameters = {
    "format"                          = [""]
    "use_csr_values"                  = [""]
    "common_name"                     = [""]
    "organization"                    = [""]
    "exclude_cn_from_sans"            = [""]
    "uri_sans"                        = [""]
    "max_path_length"                 = [""]
    "key_usage"                       = [""]
    "ttl"                             = [""]
    "not_before_duration"             = [""]
    "enforce_leaf_not_after_behavior" = [""]
  }
}
path "auth/token/lookup-self" {
  capabilities = ["read"]
}
path "auth/token/renew-self" {
  capabilities = ["update"]
}
path "auth/token/revoke-self" {
  capabilities = ["update"]
}
END
}

# enabled LIST MOUNT: whether there is such a mount.
enabled() {
	vault "$1" list -format=json | grep -q "^ *\"$2/\":"
}

pki() {
	enabled secrets "$PKI_MOUNT" || vault secrets enable -path="$PKI_MOUNT" pki
	vault secrets tune -max-lease-ttl="$ROOT_LIFETIME" "$PKI_MOUNT"
	if ! vault read "$PKI_MOUNT/issuer/$ISSUER" >/dev/null 2>&1; then
		# The key is made in Vault and cannot be read from it.
		vault write "$PKI_MOUNT/root/generate/internal" issuer_name="$ISSUER" \
			common_name="meshca root" organization="$TRUST_DOMAIN" exclude_cn_from_sans=true \
			key_type=ec key_bits=256 max_path_length=1 ttl="$ROOT_LIFETIME" >/dev/null
		echo "made root $PKI_MOUNT/issuer/$ISSUER" >&2
	fi
	if [ -n "$ROOT_FILE" ]; then
		vault read -field=certificate "$PKI_MOUNT/issuer/$ISSUER" >"$ROOT_FILE.new"
		echo >>"$ROOT_FILE.new"
		mv "$ROOT_FILE.new" "$ROOT_FILE"
	fi
}

policy() {
	show_policy | vault policy write "$POLICY" -
}

kubernetes() {
	enabled auth "$KUBERNETES_MOUNT" || vault auth enable -path="$KUBERNETES_MOUNT" kubernetes
	set -- kubernetes_host="$KUBERNETES_HOST"
	if [ -n "$KUBERNETES_CA_FILE" ]; then set -- "$@" kubernetes_ca_cert=@"$KUBERNETES_CA_FILE"; fi
	if [ -n "$REVIEWER_TOKEN_FILE" ]; then set -- "$@" token_reviewer_jwt=@"$REVIEWER_TOKEN_FILE" disable_local_ca_jwt=true; fi
	vault write "auth/$KUBERNETES_MOUNT/config" "$@"
	vault write "auth/$KUBERNETES_MOUNT/role/$KUBERNETES_ROLE" \
		bound_service_account_names="$SERVICE_ACCOUNT" bound_service_account_namespaces="$NAMESPACE" audience="$AUDIENCE" \
		token_policies="$POLICY" token_no_default_policy=true token_ttl="$TOKEN_LIFETIME" token_max_ttl="$TOKEN_MAX_LIFETIME"
}

approle() {
	enabled auth "$APPROLE_MOUNT" || vault auth enable -path="$APPROLE_MOUNT" approle
	vault write "auth/$APPROLE_MOUNT/role/$APPROLE_ROLE" \
		secret_id_ttl="$SECRET_ID_LIFETIME" secret_id_num_uses="$SECRET_ID_USES" \
		token_policies="$POLICY" token_no_default_policy=true token_ttl="$TOKEN_LIFETIME" token_max_ttl="$TOKEN_MAX_LIFETIME"
	echo "role_id: $(vault read -field=role_id "auth/$APPROLE_MOUNT/role/$APPROLE_ROLE/role-id")" >&2
}

[ $# -gt 0 ] || set -- pki policy
for part in "$@"; do
	case $part in
	pki | policy | kubernetes | approle) "$part" ;;
	show-policy) show_policy ;;
	*) echo "setup.sh: unknown part \"$part\"; known are pki, policy, kubernetes, approle and show-policy" >&2 && exit 2 ;;
	esac
done
