//! How this node admits a host: issuing tokens, and the request of `trine join`.

use super::Node;
use crate::join_token::JoinToken;
use crate::joining::{JoinAnswer, JoinRequest, PATH, Peer};
use crate::pki::{self, NodeIdentity};
use anyhow::{Result, bail};
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use controller::ids::HostId;
use controller::state::cluster::{ClusterCommand, HostAddresses, NewHost};
use controller::state::{Command, Outcome, Rejection, RejectionKind, decode_result};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::Arc;

/// Longest request that is read.
const REQUEST_BYTES_MAX: usize = 64 << 10;

/// Makes a one-time token; the log gets its hash.
pub(super) async fn issue_token(
    node: &Arc<Node>,
    ttl_seconds: u64,
    replaces: Option<HostId>,
) -> Result<Value> {
    let fingerprint = pki::fingerprint(&node.secrets.authority.certificate_pem)?;
    let token = JoinToken::create(node.config.api(), &node.config.cluster_id, fingerprint);
    let expires_ms = super::cloud::now_ms().saturating_add(ttl_seconds.saturating_mul(1000));
    let hash = JoinToken::hash(token.secret());
    let issue = Command::Cluster(ClusterCommand::IssueJoinToken { hash, expires_ms, replaces });
    match propose(node, &issue).await? {
        Ok(_) => Ok(json!({"token": token.encode(), "expires_ms": expires_ms})),
        Err(rejection) => bail!("the cluster refused: {rejection}"),
    }
}

/// The route that a joining host asks.
pub(super) fn router(node: Arc<Node>) -> Router {
    Router::new()
        .route(PATH, post(join))
        .layer(DefaultBodyLimit::max(REQUEST_BYTES_MAX))
        .with_state(node)
}

/// A refusal with its message.
struct Refused(StatusCode, String);

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let Refused(code, message) = self;
        let body = json!({"error": {"code": code.as_u16(), "message": message}});
        (code, Json(body)).into_response()
    }
}

async fn join(State(node): State<Arc<Node>>, body: Bytes) -> Result<Json<JoinAnswer>, Refused> {
    let request: JoinRequest = serde_json::from_slice(&body)
        .map_err(|error| Refused(StatusCode::BAD_REQUEST, format!("no join request: {error}")))?;
    check(&node, &request)?;
    let id = register(&node, &request).await?;
    let certificate = sign(&node, &request, id)?;
    tracing::info!(host = id, name = request.name, "a host has joined");
    let keys = node.keys.all();
    Ok(Json(JoinAnswer::new(id, certificate, &node.secrets.authority, &keys, peers(&node))))
}

/// Whatever would fail after the token is used up must fail before.
fn check(node: &Node, request: &JoinRequest) -> Result<(), Refused> {
    let bad = |message: String| Err(Refused(StatusCode::BAD_REQUEST, message));
    if request.address.is_unspecified() || request.address.is_multicast() {
        return bad(format!("the address {} is not one host's", request.address));
    }
    if request.name.is_empty() || request.name.len() > 255 {
        return bad(format!("the name {:?} must have 1 to 255 characters", request.name));
    }
    sign(node, request, 0).map(drop)
}

fn sign(node: &Node, request: &JoinRequest, id: u64) -> Result<String, Refused> {
    let identity = NodeIdentity {
        cluster_id: node.config.cluster_id.clone(),
        node_id: id,
        address: request.address,
    };
    node.secrets
        .authority
        .issue(&request.public_key, &identity)
        .map_err(|error| Refused(StatusCode::BAD_REQUEST, format!("{error}")))
}

async fn register(node: &Arc<Node>, request: &JoinRequest) -> Result<u64, Refused> {
    let at = |port| SocketAddr::new(request.address, port);
    let host = NewHost {
        name: request.name.clone(),
        addresses: HostAddresses {
            api: at(request.api_port),
            raft: at(request.raft_port),
            storage: at(request.storage_port),
            tunnel: at(request.vxlan_port),
            // It follows from the id that the commit allocates; the host's first start says it.
            server_name: String::new(),
        },
        capacity: request.capacity.into(),
        feature_level: request.feature_level,
    };
    let command = Command::Cluster(ClusterCommand::RegisterHost {
        token_hash: JoinToken::hash(&request.secret),
        host: Box::new(host),
    });
    let unavailable =
        |error: anyhow::Error| Refused(StatusCode::SERVICE_UNAVAILABLE, format!("{error:#}"));
    match propose(node, &command).await.map_err(unavailable)? {
        Ok(Outcome::Host(host)) => Ok(host.id.0),
        Ok(_) => Err(Refused(
            StatusCode::INTERNAL_SERVER_ERROR,
            "registering a host did not give a host".into(),
        )),
        Err(rejection) => Err(Refused(status_of(rejection.kind), rejection.message)),
    }
}

fn status_of(kind: RejectionKind) -> StatusCode {
    match kind {
        RejectionKind::NotFound | RejectionKind::Forbidden => StatusCode::FORBIDDEN,
        RejectionKind::Invalid => StatusCode::BAD_REQUEST,
        _ => StatusCode::CONFLICT,
    }
}

fn peers(node: &Node) -> Vec<Peer> {
    let Ok(raft) = node.raft() else { return Vec::new() };
    let me = Peer { id: node.config.node_id, address: node.config.raft() };
    let members = raft.status().members.into_iter().filter(|member| member.id != me.id);
    let others = members.filter_map(|m| Some(Peer { id: m.id, address: m.address.parse().ok()? }));
    std::iter::once(me.clone()).chain(others).collect()
}

async fn propose(node: &Node, command: &Command) -> Result<Result<Outcome, Rejection>> {
    let id = *uuid::Uuid::new_v4().as_bytes();
    let proposed = node.raft()?.propose(id, command.encode()).await?;
    Ok(decode_result(&proposed.outcome)?)
}
