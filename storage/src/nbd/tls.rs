//! Who may connect to whom: both sides show a certificate of the cluster's authority, the client
//! knows the name of the host it wants, and the server takes any host of its own cluster.

use crate::Tls;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::io;
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// A connection to another host, inside TLS.
pub(crate) type ClientStream = tokio_rustls::client::TlsStream<TcpStream>;
/// A connection from another host, inside TLS.
pub(crate) type ServerStream = tokio_rustls::server::TlsStream<TcpStream>;

/// Why the identity given at start can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A PEM text holds no usable item.
    #[error("read the PEM of {what}: {message}")]
    Pem {
        /// Which.
        what: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// The pieces don't make an identity.
    #[error("set up TLS")]
    Setup(#[source] rustls::Error),
    /// The authority can't verify clients.
    #[error("set up the verification of other hosts")]
    Verifier(#[source] rustls::server::VerifierBuilderError),
}

/// This host's identity, for both directions.
#[derive(Clone)]
pub(crate) struct Identity {
    acceptor: TlsAcceptor,
    connector: TlsConnector,
    cluster_id: Arc<str>,
}

impl Identity {
    pub(crate) fn new(tls: &Tls, cluster_id: &str) -> Result<Self, TlsError> {
        let pem = |what| {
            move |error: rustls::pki_types::pem::Error| TlsError::Pem {
                what,
                message: error.to_string(),
            }
        };
        let certificates = |what, text: &str| {
            CertificateDer::pem_slice_iter(text.as_bytes())
                .collect::<Result<Vec<_>, _>>()
                .map_err(pem(what))
        };
        let mut roots = RootCertStore::empty();
        for certificate in certificates("the authority", &tls.ca_pem)? {
            roots.add(certificate).map_err(TlsError::Setup)?;
        }
        let roots = Arc::new(roots);
        let chain = certificates("the certificate", &tls.cert_pem)?;
        let key = PrivateKeyDer::from_pem_slice(tls.key_pem.as_bytes()).map_err(pem("the key"))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions = &[&rustls::version::TLS13];
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(TlsError::Verifier)?;
        let server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(versions)
            .map_err(TlsError::Setup)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(TlsError::Setup)?;
        let client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(TlsError::Setup)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(TlsError::Setup)?;
        Ok(Self {
            acceptor: TlsAcceptor::from(Arc::new(server)),
            connector: TlsConnector::from(Arc::new(client)),
            cluster_id: cluster_id.into(),
        })
    }

    /// The server's side; refuses who is not a host of this cluster. Gives the host's name.
    pub(crate) async fn accept(&self, stream: TcpStream) -> io::Result<(ServerStream, String)> {
        let stream = self.acceptor.accept(stream).await?;
        let name = stream
            .get_ref()
            .1
            .peer_certificates()
            .and_then(|chain| host_name(chain.first()?, &self.cluster_id))
            .ok_or_else(|| {
                let message =
                    format!("the certificate is not that of a host of cluster {}", self.cluster_id);
                io::Error::new(io::ErrorKind::PermissionDenied, message)
            })?;
        Ok((stream, name))
    }

    /// The client's side; refuses a server with another name.
    pub(crate) async fn connect(&self, stream: TcpStream, name: &str) -> io::Result<ClientStream> {
        let name = ServerName::try_from(name.to_owned())
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        self.connector.connect(name, stream).await
    }
}

fn host_name(certificate: &CertificateDer<'_>, cluster_id: &str) -> Option<String> {
    let certificate = webpki::EndEntityCert::try_from(certificate).ok()?;
    certificate.valid_dns_names().find(|name| is_host_name(name, cluster_id)).map(str::to_owned)
}

/// Whether a name is `node-<id>.<cluster id>.trine`.
fn is_host_name(name: &str, cluster_id: &str) -> bool {
    name.strip_prefix("node-")
        .and_then(|rest| rest.strip_suffix(".trine"))
        .and_then(|rest| rest.strip_suffix(cluster_id))
        .and_then(|rest| rest.strip_suffix('.'))
        .is_some_and(|id| !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_host_of_the_cluster_has_a_hosts_name() {
        assert!(is_host_name("node-12.c0ffee.trine", "c0ffee"));
        for wrong in [
            "node-.c0ffee.trine",
            "node-1.decaf.trine",
            "node-1.x.c0ffee.trine",
            "node-1c0ffee.trine",
            "api.c0ffee.trine",
            "node-1.c0ffee.trine.example",
        ] {
            assert!(!is_host_name(wrong, "c0ffee"), "{wrong}");
        }
    }
}
