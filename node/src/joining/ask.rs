//! The host's side: one HTTPS request to a node that it knows by the authority's fingerprint.

use super::{JoinAnswer, JoinRequest, PATH};
use crate::join_token::JoinToken;
use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, RootCertStore, SignatureScheme};
use sha2::{Digest, Sha256};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// How long the cluster may take: a commit, and a signature.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Longest answer that is read.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// Asks the node that issued the token.
pub(crate) async fn ask(token: &JoinToken, request: &JoinRequest) -> Result<JoinAnswer> {
    let asked = tokio::time::timeout(TIMEOUT, exchange(token, request)).await;
    let (status, body) = asked
        .map_err(|_| anyhow::anyhow!("no answer in {} s", TIMEOUT.as_secs()))
        .and_then(|result| result)
        .with_context(|| format!("cannot join by the node at {}", token.api))?;
    if status.is_success() {
        return serde_json::from_slice(&body).context("the node's answer is malformed");
    }
    let body: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
    match body["error"]["message"].as_str() {
        Some(message) => bail!("the cluster refused: {message}"),
        None => bail!("the cluster refused: {status}"),
    }
}

async fn exchange(token: &JoinToken, request: &JoinRequest) -> Result<(http::StatusCode, Bytes)> {
    let tls = rustls::ClientConfig::builder()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Pinned { fingerprint: token.fingerprint()? }))
        .with_no_client_auth();
    let stream = TcpStream::connect(token.api).await?;
    let name = ServerName::IpAddress(token.api.ip().into());
    let stream = TlsConnector::from(Arc::new(tls)).connect(name, stream).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let body = serde_json::to_vec(request)?;
    let request = http::Request::post(PATH)
        .header("host", token.api.to_string())
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body)))?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
    connection.abort();
    let body = body.map_err(|error| anyhow::anyhow!("cannot read the answer: {error}"))?;
    Ok((status, body.to_bytes()))
}

/// Trusts one authority, known by the SHA-256 of its certificate, which the server sends along.
#[derive(Debug)]
struct Pinned {
    fingerprint: [u8; 32],
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let wanted = |certificate: &&CertificateDer<'_>| {
            Sha256::digest(certificate.as_ref()).as_slice() == self.fingerprint
        };
        let authority = intermediates.iter().find(wanted).ok_or_else(|| {
            rustls::Error::General("the node is not of the cluster that issued the token".into())
        })?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        let provider = Arc::new(ring::default_provider());
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?
            .verify_server_cert(end_entity, &[], server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = ring::default_provider().signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signed, &algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = ring::default_provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki::{Authority, NodeIdentity, NodeKey, fingerprint, server_tls};
    use std::net::SocketAddr;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio_rustls::TlsAcceptor;

    /// A node that refuses every request, with the authority's certificate.
    async fn node() -> (SocketAddr, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let api = listener.local_addr().unwrap();
        let authority = Authority::create("c").unwrap();
        let key = NodeKey::create().unwrap();
        let identity = NodeIdentity { cluster_id: "c".into(), node_id: 1, address: api.ip() };
        let certificate = authority.issue(&key.public_key, &identity).unwrap();
        let tls = server_tls(&certificate, &key.key_pem, &authority.certificate_pem).unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let accepted = TlsAcceptor::from(Arc::new(tls.clone())).accept(stream).await;
                let Ok(mut stream) = accepted else { continue };
                let mut request = [0; 4096];
                let _ = stream.read(&mut request).await;
                let body = br#"{"error":{"message":"the token was used"}}"#;
                let head =
                    format!("HTTP/1.1 409 Conflict\r\ncontent-length: {}\r\n\r\n", body.len());
                let _ = stream.write_all(&[head.as_bytes(), body].concat()).await;
                let _ = stream.shutdown().await;
            }
        });
        (api, authority.certificate_pem)
    }

    async fn ask_pinned(api: SocketAddr, fingerprint: [u8; 32]) -> String {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let token = JoinToken::create(api, "c", fingerprint);
        let config = crate::config::example();
        let request = JoinRequest {
            secret: token.secret().into(),
            public_key: String::new(),
            name: "n".into(),
            address: config.address,
            api_port: 1,
            raft_port: 2,
            storage_port: 3,
            vxlan_port: 4,
            capacity: crate::daemon::capacity::Capacity { vcpus: 1, ram_mib: 1, disk_gib: 1 },
            feature_level: controller::state::FEATURE_LEVEL,
        };
        format!("{:#}", ask(&token, &request).await.unwrap_err())
    }

    #[tokio::test]
    async fn the_pinned_authority_is_trusted_and_the_refusal_is_told() {
        let (api, authority) = node().await;
        let error = ask_pinned(api, fingerprint(&authority).unwrap()).await;
        assert!(error.contains("the cluster refused: the token was used"), "{error}");
    }

    #[tokio::test]
    async fn another_authority_never_sees_the_secret() {
        let (api, _) = node().await;
        let other = Authority::create("c").unwrap();
        let error = ask_pinned(api, fingerprint(&other.certificate_pem).unwrap()).await;
        assert!(error.contains("not of the cluster that issued the token"), "{error}");
    }

    #[tokio::test]
    async fn a_certificate_for_another_address_is_refused() {
        let (api, authority) = node().await;
        let listener = TcpListener::bind("127.0.0.2:0").await.unwrap();
        let other = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut a, _) = listener.accept().await.unwrap();
            let mut b = TcpStream::connect(api).await.unwrap();
            let _ = tokio::io::copy_bidirectional(&mut a, &mut b).await;
        });
        let error = ask_pinned(other, fingerprint(&authority).unwrap()).await;
        assert!(error.contains("certificate"), "{error}");
        assert!(!error.contains("refused"), "{error}");
    }
}
