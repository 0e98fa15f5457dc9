//! The catalog: which services there are and where. It follows from the cluster and from
//! the URL the client asked, so there is nothing to administer.

use axum::extract::Path;
use serde_json::{Value, json};

use super::super::body::Json;
use super::super::context::Context;
use super::super::edge::Edge;
use super::super::error::ApiError;
use super::super::policy;
use super::super::routes::Routes;
use crate::ids::{ProjectId, derived_id};
use crate::state::State;

/// A service of the catalog; `{project}` stands for the token's project.
struct Entry {
    kind: &'static str,
    name: &'static str,
    path: &'static str,
}

const SERVICES: &[Entry] = &[
    Entry { kind: "identity", name: "keystone", path: "/identity" },
    Entry { kind: "compute", name: "nova", path: "/compute/v2.1" },
    Entry { kind: "image", name: "glance", path: "/image" },
    Entry { kind: "network", name: "neutron", path: "/networking" },
    Entry { kind: "block-storage", name: "cinder", path: "/volume/v3/{project}" },
    Entry { kind: "volumev3", name: "cinderv3", path: "/volume/v3/{project}" },
];

const INTERFACES: [&str; 3] = ["public", "internal", "admin"];

pub(super) fn routes() -> Routes {
    Routes::new(super::PREFIX)
        .get("/v3/regions", policy::REGION_LIST, regions)
        .get("/v3/regions/{id}", policy::REGION_LIST, region)
        .get("/v3/services", policy::SERVICE_LIST, services)
        .get("/v3/services/{id}", policy::SERVICE_LIST, service)
        .get("/v3/endpoints", policy::ENDPOINT_LIST, endpoints)
        .get("/v3/endpoints/{id}", policy::ENDPOINT_LIST, endpoint)
}

impl Entry {
    fn id(&self, state: &State) -> String {
        derived_id(&format!("service/{}", self.kind), &state.cluster.id).simple().to_string()
    }

    fn endpoint_id(&self, state: &State, interface: &str) -> String {
        let kind = format!("endpoint/{}/{interface}", self.kind);
        derived_id(&kind, &state.cluster.id).simple().to_string()
    }

    fn url(&self, edge: &Edge, project: &str) -> String {
        format!("{}{}", edge.base_url, self.path.replace("{project}", project))
    }
}

/// The catalog of a token in `project`; what needs a project is left out without one.
pub(super) fn catalog(state: &State, edge: &Edge, project: Option<&ProjectId>) -> Value {
    let shown = SERVICES.iter().filter(|entry| project.is_some() || !entry.path.contains('{'));
    shown
        .map(|entry| {
            let url = entry.url(edge, project.map_or("", |project| project.as_str()));
            let endpoints = INTERFACES.map(|interface| {
                json!({
                    "id": entry.endpoint_id(state, interface),
                    "interface": interface,
                    "region": state.cluster.region,
                    "region_id": state.cluster.region,
                    "url": url,
                })
            });
            json!({
                "id": entry.id(state), "type": entry.kind, "name": entry.name,
                "endpoints": endpoints,
            })
        })
        .collect()
}

fn region_view(ctx: &Context) -> Value {
    let id = &ctx.state.cluster.region;
    json!({
        "id": id,
        "description": "",
        "parent_region_id": null,
        "links": {"self": ctx.url(&format!("/identity/v3/regions/{id}"))},
    })
}

async fn regions(ctx: Context) -> Json {
    Json::ok(super::listed(&ctx, "regions", vec![region_view(&ctx)]))
}

async fn region(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    if id != ctx.state.cluster.region {
        return Err(ApiError::not_found("region", &id));
    }
    Ok(Json::ok(json!({"region": region_view(&ctx)})))
}

fn service_views(ctx: &Context) -> Vec<Value> {
    let passes = |entry: &&Entry| {
        ctx.query.admits("type", entry.kind) && ctx.query.admits("name", entry.name)
    };
    SERVICES
        .iter()
        .filter(passes)
        .map(|entry| {
            let id = entry.id(&ctx.state);
            json!({
                "type": entry.kind, "name": entry.name, "enabled": true, "description": "",
                "links": {"self": ctx.url(&format!("/identity/v3/services/{id}"))},
                "id": id,
            })
        })
        .collect()
}

async fn services(ctx: Context) -> Json {
    Json::ok(super::listed(&ctx, "services", service_views(&ctx)))
}

fn by_id(views: Vec<Value>, kind: &str, id: &str) -> Result<Value, ApiError> {
    let found = views.into_iter().find(|view| view["id"].as_str() == Some(id));
    found.ok_or_else(|| ApiError::not_found(kind, id))
}

async fn service(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    Ok(Json::ok(json!({"service": by_id(service_views(&ctx), "service", &id)?})))
}

fn endpoint_views(ctx: &Context) -> Vec<Value> {
    let all = SERVICES.iter().flat_map(|entry| INTERFACES.map(|interface| (entry, interface)));
    all.filter(|(entry, interface)| {
        ctx.query.admits("interface", interface)
            && ctx.query.admits("service_id", &entry.id(&ctx.state))
    })
    .map(|(entry, interface)| {
        let id = entry.endpoint_id(&ctx.state, interface);
        json!({
            "interface": interface,
            "region": ctx.state.cluster.region,
            "region_id": ctx.state.cluster.region,
            "service_id": entry.id(&ctx.state),
            "enabled": true,
            "url": entry.url(&ctx.edge, "$(project_id)s"),
            "links": {"self": ctx.url(&format!("/identity/v3/endpoints/{id}"))},
            "id": id,
        })
    })
    .collect()
}

async fn endpoints(ctx: Context) -> Json {
    Json::ok(super::listed(&ctx, "endpoints", endpoint_views(&ctx)))
}

async fn endpoint(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    Ok(Json::ok(json!({"endpoint": by_id(endpoint_views(&ctx), "endpoint", &id)?})))
}
