//! Who is who: TLS 1.3 on both sides, by certificates of the cluster's authority that name
//! `node-<id>.<cluster id>.trine`.

use std::sync::Arc;

use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor, verify_server_name,
    },
    crypto::{CryptoProvider, ring, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::{ParsedCertificate, WebPkiClientVerifier},
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::{NodeId, Tls};

/// Why certificates can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A PEM text holds nothing usable.
    #[error("can't read {what}: {reason}")]
    Pem {
        /// Which text.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The certificates don't fit together.
    #[error("can't use {what}")]
    Unusable {
        /// Which of them.
        what: &'static str,
        /// What rustls says.
        #[source]
        source: rustls::Error,
    },
    /// The node's own certificate names somebody else.
    #[error("this node's certificate does not name {0}")]
    OwnName(String),
}

/// The DNS name that a node's certificate carries as subject alternative name.
pub fn peer_name(cluster_id: &[u8; 16], node_id: NodeId) -> String {
    let cluster: String = cluster_id.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("node-{node_id}.{cluster}.trine")
}

/// Both sides' TLS settings.
pub(crate) struct TlsContext {
    pub(crate) cluster_id: [u8; 16],
    known: TlsConnector,
    anyone: TlsConnector,
    pub(crate) acceptor: TlsAcceptor,
}

impl TlsContext {
    pub(crate) fn new(cluster_id: [u8; 16], tls: &Tls) -> Result<Self, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let roots = Arc::new(roots(tls)?);
        let chain = certificates(&tls.cert, "this node's certificate")?;
        Ok(Self {
            cluster_id,
            known: client(&provider, tls, &chain, None, &roots)?,
            anyone: client(
                &provider,
                tls,
                &chain,
                Some(AnyNode { roots: roots.clone(), provider: provider.clone() }),
                &roots,
            )?,
            acceptor: server(&provider, tls, chain, roots)?,
        })
    }

    /// Checks that our own certificate says who we are: peers would refuse us otherwise.
    pub(crate) fn check_own_name(&self, tls: &Tls, me: NodeId) -> Result<(), TlsError> {
        let chain = certificates(&tls.cert, "this node's certificate")?;
        if chain.first().is_some_and(|cert| names(cert, &self.cluster_id, me)) {
            return Ok(());
        }
        Err(TlsError::OwnName(peer_name(&self.cluster_id, me)))
    }

    /// How to connect to a node: with its name checked in the handshake when we know it.
    pub(crate) fn connector(
        &self,
        expected: Option<NodeId>,
    ) -> (TlsConnector, ServerName<'static>) {
        let name = peer_name(&self.cluster_id, expected.unwrap_or_default());
        let name = ServerName::try_from(name).expect("digits and hexadecimal make a DNS name");
        match expected {
            Some(_) => (self.known.clone(), name),
            None => (self.anyone.clone(), name),
        }
    }

    /// Whether a certificate that the handshake has verified names this node.
    pub(crate) fn names(&self, chain: Option<&[CertificateDer<'_>]>, node: NodeId) -> bool {
        chain.and_then(<[_]>::first).is_some_and(|cert| names(cert, &self.cluster_id, node))
    }
}

fn names(certificate: &CertificateDer<'_>, cluster_id: &[u8; 16], node: NodeId) -> bool {
    let Ok(parsed) = ParsedCertificate::try_from(certificate) else {
        return false;
    };
    ServerName::try_from(peer_name(cluster_id, node))
        .is_ok_and(|name| verify_server_name(&parsed, &name).is_ok())
}

fn roots(tls: &Tls) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&tls.ca, "the cluster authority's certificate")? {
        roots.add(certificate).map_err(|source| TlsError::Unusable {
            what: "the cluster authority's certificate",
            source,
        })?;
    }
    Ok(roots)
}

fn certificates(pem: &str, what: &'static str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    let found = found.map_err(|error| TlsError::Pem { what, reason: error.to_string() })?;
    if found.is_empty() {
        return Err(TlsError::Pem { what, reason: "it holds no certificate".to_owned() });
    }
    Ok(found)
}

fn key(tls: &Tls) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(tls.key.as_bytes()).map_err(|error| TlsError::Pem {
        what: "this node's private key",
        reason: error.to_string(),
    })
}

fn unusable(what: &'static str) -> impl FnOnce(rustls::Error) -> TlsError {
    move |source| TlsError::Unusable { what, source }
}

fn client(
    provider: &Arc<CryptoProvider>,
    tls: &Tls,
    chain: &[CertificateDer<'static>],
    anyone: Option<AnyNode>,
    roots: &Arc<RootCertStore>,
) -> Result<TlsConnector, TlsError> {
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable("TLS 1.3"))?;
    let builder = match anyone {
        None => builder.with_root_certificates(roots.clone()),
        Some(verifier) => builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier)),
    };
    let config = builder
        .with_client_auth_cert(chain.to_vec(), key(tls)?)
        .map_err(unusable("this node's certificate and key"))?;
    Ok(TlsConnector::from(Arc::new(config)))
}

fn server(
    provider: &Arc<CryptoProvider>,
    tls: &Tls,
    chain: Vec<CertificateDer<'static>>,
    roots: Arc<RootCertStore>,
) -> Result<TlsAcceptor, TlsError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
        .build()
        .map_err(|error| TlsError::Pem {
            what: "the cluster authority's certificate",
            reason: error.to_string(),
        })?;
    let config = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable("TLS 1.3"))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key(tls)?)
        .map_err(unusable("this node's certificate and key"))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Accepts any server whose certificate the cluster's authority signed; its name is checked against
/// the id it claims in its hello. For nodes that know an address but not yet who lives there.
#[derive(Debug)]
struct AnyNode {
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for AnyNode {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &self.roots,
            intermediates,
            now,
            algorithms,
        )?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("only TLS 1.3 is spoken here".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
