//! The cluster's authority and the certificates it signs. A node's certificate says who it is by
//! the DNS name `node-ID.CLUSTER.trine`; its address is in it for clients of the API.

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
    date_time_ymd,
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
        let mut params = act("make the authority", CertificateParams::new(Vec::new()))?;
        params.distinguished_name = name(&format!("trine {cluster_id}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        validity(&mut params);
        let certificate = act("sign the authority", params.self_signed(&key))?;
        Ok(Authority { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }

    /// An authority from its files.
    pub(crate) fn from_pem(certificate_pem: String, key_pem: String) -> Authority {
        Authority { certificate_pem, key_pem }
    }

    /// The key, for its file and for a node that joins.
    pub(crate) fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// Signs a node's certificate for the key of `request`. Nothing else of the request is used:
    /// who the node is, the authority says.
    pub(crate) fn issue(&self, request_pem: &str, node: &NodeIdentity) -> Result<String, Error> {
        let request = CertificateSigningRequestParams::from_pem(request_pem);
        let request = act("read the certificate request", request)?;
        let key = act("read the authority's key", KeyPair::from_pem(&self.key_pem))?;
        let issuer = Issuer::from_ca_cert_pem(&self.certificate_pem, key);
        let issuer = act("read the authority's certificate", issuer)?;
        let names = vec![node.server_name()];
        let mut params = act("name the node", CertificateParams::new(names))?;
        params.subject_alt_names.push(SanType::IpAddress(node.address));
        params.distinguished_name = name(&node.server_name());
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        validity(&mut params);
        let certificate = params.signed_by(&request.public_key, &issuer);
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

/// A node's key and the request for its certificate.
pub(crate) struct NodeKey {
    /// The private key, PEM.
    pub(crate) key_pem: String,
    /// The request, PEM.
    pub(crate) request_pem: String,
}

impl NodeKey {
    /// A new key.
    pub(crate) fn create() -> Result<NodeKey, Error> {
        let key = act("make the node's key", KeyPair::generate())?;
        let params = act("make a certificate request", CertificateParams::new(Vec::new()))?;
        let request = act("make a certificate request", params.serialize_request(&key))?;
        let request_pem = act("make a certificate request", request.pem())?;
        Ok(NodeKey { key_pem: key.serialize_pem(), request_pem })
    }
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
        let certificate = authority.issue(&key.request_pem, &identity(1)).unwrap();
        server_tls(&certificate, &key.key_pem, &authority.certificate_pem).unwrap();
        let other = NodeKey::create().unwrap();
        assert!(server_tls(&certificate, &other.key_pem, &authority.certificate_pem).is_err());
    }

    #[test]
    fn names_come_from_the_authority_and_not_from_the_request() {
        let authority = Authority::create("c").unwrap();
        let key = KeyPair::generate().unwrap();
        let claims = CertificateParams::new(vec!["node-1.evil.trine".to_string()]).unwrap();
        let request = claims.serialize_request(&key).unwrap().pem().unwrap();
        let certificate = authority.issue(&request, &identity(7)).unwrap();
        let der = CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap();
        let contains = |text: &str| der.windows(text.len()).any(|w| w == text.as_bytes());
        assert!(contains(&identity(7).server_name()));
        assert!(!contains("evil"));
    }

    #[test]
    fn a_request_that_is_none_is_refused() {
        let authority = Authority::create("c").unwrap();
        assert!(authority.issue("nonsense", &identity(1)).is_err());
        assert!(authority.issue(&authority.certificate_pem, &identity(1)).is_err());
    }
}
