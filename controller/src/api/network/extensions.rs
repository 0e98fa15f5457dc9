//! `/v2.0/extensions`: what the API has beyond Neutron's core. Only what is true is listed.

use axum::extract::Path;
use serde_json::{Value, json};

use crate::api::body::Json;
use crate::api::context::Context;
use crate::api::error::ApiError;
use crate::api::policy;
use crate::api::routes::Routes;

const EXTENSIONS: &[(&str, &str)] = &[
    ("allowed-address-pairs", "Allowed Address Pairs"),
    ("binding", "Port Binding"),
    ("external-net", "Neutron external network"),
    ("floating-ip-port-forwarding", "Floating IP Port Forwarding"),
    ("net-mtu", "Network MTU"),
    ("pagination", "Pagination support"),
    ("port-security", "Port Security"),
    ("project-id", "project_id field enabled"),
    ("provider", "Provider Network"),
    ("security-group", "security-group"),
    ("sorting", "Sorting support"),
    ("standard-attr-description", "standard-attr-description"),
    ("standard-attr-revisions", "Resource revision numbers"),
    ("standard-attr-timestamp", "Resource timestamps"),
    ("stateful-security-group", "Stateful security group"),
];

pub(super) fn routes() -> Routes {
    Routes::new(super::PREFIX).get("/v2.0/extensions", policy::NETWORK_EXTENSION_LIST, list).get(
        "/v2.0/extensions/{alias}",
        policy::NETWORK_EXTENSION_LIST,
        show,
    )
}

fn view((alias, name): &(&str, &str)) -> Value {
    json!({
        "alias": alias, "name": name, "description": name, "links": [],
        "updated": "2026-01-01T00:00:00-00:00",
    })
}

async fn list(_: Context) -> Json {
    let extensions: Vec<Value> = EXTENSIONS.iter().map(view).collect();
    Json::ok(json!({"extensions": extensions}))
}

async fn show(_: Context, Path(alias): Path<String>) -> Result<Json, ApiError> {
    let found = EXTENSIONS.iter().find(|(known, _)| *known == alias);
    let found = found.ok_or_else(|| ApiError::not_found("extension", &alias))?;
    Ok(Json::ok(json!({"extension": view(found)})))
}
