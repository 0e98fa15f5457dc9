//! HTTPS by hyper: connections are kept and used again, one request at a time on each.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use rustls::pki_types::pem::PemObject;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Longest answer that is read.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Idle connections that are kept for each node.
const IDLE_MAX: usize = 16;

type Connection = SendRequest<Full<Bytes>>;

/// An HTTPS client that trusts one authority.
#[derive(Clone)]
pub(super) struct Https {
    connector: TlsConnector,
    idle: Arc<Mutex<BTreeMap<String, Vec<Connection>>>>,
}

impl Https {
    /// Trusts the authority in a PEM file.
    pub(super) fn new(cacert: &Path) -> Result<Https> {
        let authority = rustls::pki_types::CertificateDer::from_pem_file(cacert)
            .with_context(|| format!("cannot read the authority in {}", cacert.display()))?;
        let mut roots = rustls::RootCertStore::empty();
        roots.add(authority)?;
        let config =
            rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        Ok(Https { connector: TlsConnector::from(Arc::new(config)), idle: Arc::default() })
    }

    /// One request to `authority` (`host:port`) and its whole answer.
    pub(super) async fn send(
        &self,
        authority: &str,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Bytes>> {
        let exchange = self.exchange(authority, request);
        tokio::time::timeout(TIMEOUT, exchange)
            .await
            .with_context(|| format!("no answer in {} s", TIMEOUT.as_secs()))?
    }

    async fn exchange(
        &self,
        authority: &str,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Bytes>> {
        let mut connection = match self.take_idle(authority) {
            Some(connection) => connection,
            None => self.connect(authority).await?,
        };
        let (head, body) = connection.send_request(request).await?.into_parts();
        let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(|error| anyhow::anyhow!("the answer broke off: {error}"))?;
        self.keep(authority, connection);
        Ok(Response::from_parts(head, body.to_bytes()))
    }

    fn take_idle(&self, authority: &str) -> Option<Connection> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let connections = idle.get_mut(authority)?;
        connections.retain(|connection| !connection.is_closed());
        let ready = connections.iter().position(SendRequest::is_ready)?;
        Some(connections.swap_remove(ready))
    }

    fn keep(&self, authority: &str, connection: Connection) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let connections = idle.entry(authority.to_string()).or_default();
        if connections.len() < IDLE_MAX {
            connections.push(connection);
        }
    }

    async fn connect(&self, authority: &str) -> Result<Connection> {
        let stream = TcpStream::connect(authority).await?;
        stream.set_nodelay(true)?;
        let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
        let name = ServerName::try_from(host.trim_matches(['[', ']']).to_string())?;
        let stream = self.connector.connect(name, stream).await?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        // It ends with its last sender; what it ends with, the sender reports as well.
        tokio::spawn(connection);
        Ok(sender)
    }
}
