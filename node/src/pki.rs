//! The cluster's authority and the certificates it signs. A node's certificate says who it is by
//! the DNS name `node-ID.CLUSTER.trine`; its address is in it for clients of the API.

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType,
    SignatureAlgorithm, date_time_ymd,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use sha2::{Digest, Sha256};
use std::net::IpAddr;

/// A failed act on certificates.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// Making or signing.
    #[error("cannot {act}")]
    Sign {
        /// What was tried.
        act: &'static str,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
    /// A public key that is none.
    #[error("the public key must be a point of P-256, 65 bytes in hexadecimal")]
    PublicKey,
    /// A PEM text that is none.
    #[error("the {what} is no PEM text of its kind")]
    Pem {
        /// Which.
        what: &'static str,
    },
    /// TLS refused the parts.
    #[error("cannot set up TLS")]
    Tls(#[source] rustls::Error),
}

fn act<T>(act: &'static str, result: Result<T, rcgen::Error>) -> Result<T, Error> {
    result.map_err(|source| Error::Sign { act, source })
}

/// The authority of a cluster: certificate and key, PEM. Its `Debug` shows no key.
#[derive(Clone)]
pub(crate) struct Authority {
    cluster_id: String,
    /// The certificate.
    pub(crate) certificate_pem: String,
    key_pem: String,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").finish_non_exhaustive()
    }
}

impl Authority {
    /// A new authority for a cluster.
    pub(crate) fn create(cluster_id: &str) -> Result<Authority, Error> {
        let key = act("make the authority's key", KeyPair::generate())?;
        let certificate = act("sign the authority", authority(cluster_id)?.self_signed(&key))?;
        Ok(Authority {
            cluster_id: cluster_id.to_owned(),
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
        })
    }

    /// A cluster's authority from its files.
    pub(crate) fn from_pem(
        cluster_id: &str,
        certificate_pem: String,
        key_pem: String,
    ) -> Authority {
        Authority { cluster_id: cluster_id.to_owned(), certificate_pem, key_pem }
    }

    /// The key, for its file and for a node that joins.
    pub(crate) fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// Signs a node's certificate for its key. Who claims another's key gets a certificate that is
    /// of no use without the private part.
    pub(crate) fn issue(&self, public_key: &str, node: &NodeIdentity) -> Result<String, Error> {
        let public_key: NodePublicKey = public_key.parse()?;
        let key = act("read the authority's key", KeyPair::from_pem(&self.key_pem))?;
        let issuer = Issuer::new(authority(&self.cluster_id)?, key);
        let names = vec![node.server_name()];
        let mut params = act("name the node", CertificateParams::new(names))?;
        params.subject_alt_names.push(SanType::IpAddress(node.address));
        params.distinguished_name = name(&node.server_name());
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        validity(&mut params);
        let certificate = params.signed_by(&public_key, &issuer);
        Ok(act("sign the node's certificate", certificate)?.pem())
    }
}

/// Who a certificate is for.
#[derive(Clone, Debug)]
pub(crate) struct NodeIdentity {
    /// The cluster, 32 hexadecimal digits.
    pub(crate) cluster_id: String,
    /// The node.
    pub(crate) node_id: u64,
    /// Its address.
    pub(crate) address: IpAddr,
}

impl NodeIdentity {
    /// The DNS name in its certificate.
    pub(crate) fn server_name(&self) -> String {
        server_name(self.node_id, &self.cluster_id)
    }
}

/// The DNS name by which nodes know each other.
pub(crate) fn server_name(node_id: u64, cluster_id: &str) -> String {
    format!("node-{node_id}.{cluster_id}.trine")
}

/// A node's key.
pub(crate) struct NodeKey {
    /// The private key, PEM.
    pub(crate) key_pem: String,
    /// The public key: a point of P-256, hexadecimal.
    pub(crate) public_key: String,
}

impl NodeKey {
    /// A new key.
    pub(crate) fn create() -> Result<NodeKey, Error> {
        let key = act("make the node's key", KeyPair::generate())?;
        Ok(NodeKey { key_pem: key.serialize_pem(), public_key: hex::encode(key.der_bytes()) })
    }
}

/// A public key that a node sent: an uncompressed point of P-256 (SEC 1, section 2.3.3).
struct NodePublicKey(Vec<u8>);

impl std::str::FromStr for NodePublicKey {
    type Err = Error;

    fn from_str(text: &str) -> Result<NodePublicKey, Error> {
        let point = hex::decode(text).map_err(|_| Error::PublicKey)?;
        match point.as_slice() {
            [4, coordinates @ ..] if coordinates.len() == 64 => Ok(NodePublicKey(point)),
            _ => Err(Error::PublicKey),
        }
    }
}

impl PublicKeyData for NodePublicKey {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

/// What the authority of a cluster says of itself.
fn authority(cluster_id: &str) -> Result<CertificateParams, Error> {
    let mut params = act("make the authority", CertificateParams::new(Vec::new()))?;
    params.distinguished_name = name(&format!("trine {cluster_id}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    validity(&mut params);
    Ok(params)
}

fn name(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    name
}

/// Ends are far away because nothing renews yet; beginnings are in the past for clocks that are off.
fn validity(params: &mut CertificateParams) {
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2049, 12, 31);
}

/// SHA-256 of a certificate's DER, which a join token carries.
pub(crate) fn fingerprint(certificate_pem: &str) -> Result<[u8; 32], Error> {
    let certificate = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
        .map_err(|_| Error::Pem { what: "authority's certificate" })?;
    Ok(Sha256::digest(&certificate).into())
}

/// The API's side of TLS: the node's certificate with the authority's behind it, so that a host
/// which knows only the authority's fingerprint can check it.
pub(crate) fn server_tls(
    certificate_pem: &str,
    key_pem: &str,
    authority_pem: &str,
) -> Result<rustls::ServerConfig, Error> {
    let read = |pem: &str, what| {
        CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_| Error::Pem { what })
    };
    let chain = vec![
        read(certificate_pem, "node's certificate")?,
        read(authority_pem, "authority's certificate")?,
    ];
    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())
        .map_err(|_| Error::Pem { what: "node's key" })?;
    let mut tls = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(Error::Tls)?;
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(tls)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(node_id: u64) -> NodeIdentity {
        let cluster_id = "00112233445566778899aabbccddeeff".into();
        NodeIdentity { cluster_id, node_id, address: [127, 0, 0, 11].into() }
    }

    #[test]
    fn a_signed_certificate_serves_tls_with_its_key_only() {
        let authority = Authority::create("c").unwrap();
        let key = NodeKey::create().unwrap();
        let certificate = authority.issue(&key.public_key, &identity(1)).unwrap();
        server_tls(&certificate, &key.key_pem, &authority.certificate_pem).unwrap();
        let other = NodeKey::create().unwrap();
        assert!(server_tls(&certificate, &other.key_pem, &authority.certificate_pem).is_err());
    }

    #[test]
    fn a_certificate_is_accepted_by_whoever_trusts_the_authority() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let authority = Authority::create("c").unwrap();
        let authority = Authority::from_pem(
            "c",
            authority.certificate_pem.clone(),
            authority.key_pem().to_owned(),
        );
        let key = NodeKey::create().unwrap();
        let pem = authority.issue(&key.public_key, &identity(7)).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        let der = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
        roots.add(der(&authority.certificate_pem)).unwrap();
        let verifier = rustls::client::WebPkiServerVerifier::builder(roots.into()).build().unwrap();
        let check = |name: String| {
            use rustls::client::danger::ServerCertVerifier;
            let name = name.try_into().unwrap();
            let now = rustls::pki_types::UnixTime::now();
            verifier.verify_server_cert(&der(&pem), &[], &name, &[], now).map(drop)
        };
        check(identity(7).server_name()).unwrap();
        check(identity(8).server_name()).unwrap_err();
    }

    #[test]
    fn a_public_key_that_is_none_is_refused() {
        let authority = Authority::create("c").unwrap();
        let compressed = format!("02{}", "11".repeat(32));
        for text in ["", "nonsense", "04", &compressed, &authority.certificate_pem] {
            assert!(authority.issue(text, &identity(1)).is_err(), "{text}");
        }
    }
}
