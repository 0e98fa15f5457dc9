//! What clients ask before anything else: which versions each service has, and whether
//! the node serves.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use http::StatusCode;
use serde_json::{Value, json};

use super::Api;
use super::body::Json;
use super::context::Context;
use super::edge::Edge;
use super::error::ApiError;
use super::microversion::{self, Range};
use super::policy;
use super::routes::Routes;

/// When the shapes that are served were last changed, as version documents say it.
const UPDATED: &str = "2026-11-01T00:00:00Z";

pub(super) fn routes() -> Routes {
    Routes::new("")
        .open_get("/", root)
        .open_get("/healthz", healthz)
        .open_get("/identity", identity_versions)
        .open_get("/identity/", identity_versions)
        .open_get("/identity/v3", identity_version)
        .open_get("/identity/v3/", identity_version)
        .open_get("/compute", compute_versions)
        .open_get("/compute/", compute_versions)
        .open_get("/compute/v2.1", compute_version)
        .open_get("/compute/v2.1/", compute_version)
        .open_get("/image", image_versions)
        .open_get("/image/", image_versions)
        .open_get("/image/versions", image_versions)
        .open_get("/volume", volume_versions)
        .open_get("/volume/", volume_versions)
        .get("/volume/v3", policy::VOLUME_VERSIONS, volume_version)
        .get("/volume/v3/", policy::VOLUME_VERSIONS, volume_version)
        .open_get("/networking", network_versions)
        .open_get("/networking/", network_versions)
}

fn link(edge: &Edge, path: &str) -> Value {
    json!([{"rel": "self", "href": format!("{}{path}", edge.base_url)}])
}

async fn root(Extension(edge): Extension<Edge>) -> Json {
    let at = |path: &str| format!("{}{path}", edge.base_url);
    Json::ok(json!({
        "name": "trine",
        "version": env!("CARGO_PKG_VERSION"),
        "services": {
            "identity": at("/identity/v3"),
            "compute": at("/compute/v2.1"),
            "image": at("/image"),
            "block-storage": at("/volume/v3"),
            "network": at("/networking"),
        },
    }))
}

/// 200 when this node can serve a linearizable read, else 503; with what it knows.
async fn healthz(State(api): State<Arc<Api>>) -> Json {
    let read = api.cloud.read().await;
    let status = if read.is_ok() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    Json(
        status,
        json!({
            "status": if read.is_ok() { "ok" } else { "unavailable" },
            "reason": read.err().map(|error| error.to_string()),
        }),
    )
}

fn identity_document(edge: &Edge) -> Value {
    json!({
        "id": "v3.14",
        "status": "stable",
        "updated": UPDATED,
        "links": link(edge, "/identity/v3/"),
        "media-types": [{
            "base": "application/json",
            "type": "application/vnd.openstack.identity-v3+json",
        }],
    })
}

async fn identity_versions(Extension(edge): Extension<Edge>) -> Json {
    let body = json!({"versions": {"values": [identity_document(&edge)]}});
    Json(StatusCode::MULTIPLE_CHOICES, body)
}

async fn identity_version(Extension(edge): Extension<Edge>) -> Json {
    Json::ok(json!({"version": identity_document(&edge)}))
}

fn ranged(edge: &Edge, id: &str, range: &Range, path: &str) -> Value {
    json!({
        "id": id,
        "status": "CURRENT",
        "version": range.max.to_string(),
        "min_version": range.min.to_string(),
        "updated": UPDATED,
        "links": link(edge, path),
        "media-types": [{
            "base": "application/json",
            "type": format!("application/vnd.openstack.{}+json;version={id}", range.word),
        }],
    })
}

async fn compute_versions(Extension(edge): Extension<Edge>) -> Json {
    let document = ranged(&edge, "v2.1", &microversion::COMPUTE, "/compute/v2.1/");
    Json::ok(json!({"versions": [document]}))
}

async fn compute_version(Extension(edge): Extension<Edge>) -> Json {
    let document = ranged(&edge, "v2.1", &microversion::COMPUTE, "/compute/v2.1/");
    Json::ok(json!({"version": document}))
}

async fn image_versions(Extension(edge): Extension<Edge>) -> Json {
    let version = |id: &str, status: &str| json!({"id": id, "status": status, "links": link(&edge, "/image/v2/")});
    let body = json!({"versions": [
        version("v2.9", "CURRENT"),
        version("v2.7", "SUPPORTED"),
        version("v2.5", "SUPPORTED"),
        version("v2.4", "SUPPORTED"),
        version("v2.3", "SUPPORTED"),
        version("v2.2", "SUPPORTED"),
        version("v2.1", "SUPPORTED"),
        version("v2.0", "SUPPORTED"),
    ]});
    Json(StatusCode::MULTIPLE_CHOICES, body)
}

fn volume_document(edge: &Edge) -> Value {
    let document = ranged(edge, "v3.0", &microversion::VOLUME, "/volume/v3/");
    json!({"versions": [document]})
}

async fn volume_versions(Extension(edge): Extension<Edge>) -> Json {
    Json(StatusCode::MULTIPLE_CHOICES, volume_document(&edge))
}

async fn volume_version(ctx: Context) -> Result<Json, ApiError> {
    Ok(Json::ok(volume_document(&ctx.edge)))
}

async fn network_versions(Extension(edge): Extension<Edge>) -> Json {
    Json::ok(json!({"versions": [{
        "id": "v2.0", "status": "CURRENT", "links": link(&edge, "/networking/v2.0"),
    }]}))
}
