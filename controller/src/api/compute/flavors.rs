//! `/v2.1/flavors` with extra specifications and access.

use std::collections::{BTreeMap, BTreeSet};

use axum::extract::Path;
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::super::body::{Body, Json, lenient_bool, lenient_u64};
use super::super::context::Context;
use super::super::error::{ApiError, ErrorKind};
use super::super::routes::Routes;
use super::super::{policy, unexpected};
use crate::ids::{FlavorId, ProjectId};
use crate::state::compute::{ComputeCommand, Flavor};
use crate::state::{Command, Outcome};

const EXTRA_SPECS_MAX: usize = 128;

pub(super) fn routes() -> Routes {
    Routes::new(super::PREFIX)
        .get("/v2.1/flavors", policy::FLAVOR_LIST, list)
        .get("/v2.1/flavors/detail", policy::FLAVOR_LIST, detail)
        .post("/v2.1/flavors", policy::FLAVOR_CREATE, create)
        .get("/v2.1/flavors/{id}", policy::FLAVOR_GET, show)
        .put("/v2.1/flavors/{id}", policy::FLAVOR_UPDATE, update)
        .delete("/v2.1/flavors/{id}", policy::FLAVOR_DELETE, remove)
        .post("/v2.1/flavors/{id}/action", policy::FLAVOR_ACCESS_CHANGE, action)
        .get("/v2.1/flavors/{id}/os-flavor-access", policy::FLAVOR_ACCESS_LIST, access)
        .get("/v2.1/flavors/{id}/os-extra_specs", policy::FLAVOR_SPECS_LIST, specs)
        .post("/v2.1/flavors/{id}/os-extra_specs", policy::FLAVOR_SPECS_CHANGE, set_specs)
        .get("/v2.1/flavors/{id}/os-extra_specs/{key}", policy::FLAVOR_SPECS_LIST, spec)
        .put("/v2.1/flavors/{id}/os-extra_specs/{key}", policy::FLAVOR_SPECS_CHANGE, set_spec)
        .delete("/v2.1/flavors/{id}/os-extra_specs/{key}", policy::FLAVOR_SPECS_CHANGE, drop_spec)
}

#[derive(Deserialize)]
struct CreateRequest {
    flavor: FlavorFields,
}

#[derive(Deserialize)]
struct FlavorFields {
    id: Option<Value>,
    name: String,
    #[serde(default, deserialize_with = "lenient_u64")]
    ram: Option<u64>,
    #[serde(default, deserialize_with = "lenient_u64")]
    vcpus: Option<u64>,
    #[serde(default, deserialize_with = "lenient_u64")]
    disk: Option<u64>,
    #[serde(default, deserialize_with = "lenient_u64", rename = "OS-FLV-EXT-DATA:ephemeral")]
    ephemeral: Option<u64>,
    #[serde(default, deserialize_with = "lenient_u64")]
    swap: Option<u64>,
    rxtx_factor: Option<Value>,
    #[serde(default, deserialize_with = "lenient_bool", rename = "os-flavor-access:is_public")]
    is_public: Option<bool>,
    description: Option<String>,
}

#[derive(Deserialize)]
struct UpdateRequest {
    flavor: Description,
}

#[derive(Deserialize)]
struct Description {
    description: Option<String>,
}

#[derive(Deserialize)]
struct SpecsRequest {
    extra_specs: BTreeMap<String, Value>,
}

pub(super) fn flavor_links(ctx: &Context, id: &FlavorId) -> Value {
    json!([
        {"rel": "self", "href": ctx.url(&format!("/compute/v2.1/flavors/{id}"))},
        {"rel": "bookmark", "href": ctx.url(&format!("/compute/flavors/{id}"))},
    ])
}

/// Swap in MiB; before 2.75 an empty text stood for none.
pub(super) fn swap(ctx: &Context, flavor: &Flavor) -> Value {
    if flavor.swap_mib == 0 && !ctx.at_least(2, 75) { json!("") } else { json!(flavor.swap_mib) }
}

fn flavor_view(ctx: &Context, flavor: &Flavor) -> Value {
    let mut view = json!({
        "id": flavor.id, "name": flavor.name, "ram": flavor.ram_mib, "disk": flavor.root_gib,
        "vcpus": flavor.vcpus, "swap": swap(ctx, flavor), "rxtx_factor": flavor.rxtx_factor,
        "OS-FLV-EXT-DATA:ephemeral": flavor.ephemeral_gib,
        "OS-FLV-DISABLED:disabled": flavor.disabled,
        "os-flavor-access:is_public": flavor.is_public,
        "links": flavor_links(ctx, &flavor.id),
    });
    if ctx.at_least(2, 55) {
        view["description"] = json!(flavor.description);
    }
    if ctx.at_least(2, 61) {
        view["extra_specs"] = json!(flavor.extra_specs);
    }
    view
}

fn short_view(ctx: &Context, flavor: &Flavor) -> Value {
    let mut view = json!({
        "id": flavor.id, "name": flavor.name, "links": flavor_links(ctx, &flavor.id),
    });
    if ctx.at_least(2, 55) {
        view["description"] = json!(flavor.description);
    }
    view
}

fn sees(ctx: &Context, flavor: &Flavor) -> bool {
    let shared = || flavor.projects.iter().any(|project| ctx.owns(project));
    flavor.is_public || ctx.is_admin() || shared()
}

/// The flavor, if the caller may see it.
pub(super) fn find<'a>(ctx: &'a Context, id: &str) -> Result<&'a Flavor, ApiError> {
    let flavor = ctx.state.compute.flavors.get(id).filter(|flavor| sees(ctx, flavor));
    flavor.ok_or_else(|| {
        ApiError::new(ErrorKind::NotFound, format!("Flavor {id} could not be found."))
    })
}

/// What `is_public` asks for: administrators may ask for both (`None`) or the others.
fn wanted_public(ctx: &Context) -> Result<Option<bool>, ApiError> {
    match ctx.query.get("is_public") {
        None => Ok(Some(true)),
        Some(_) => ctx.query.bool("is_public"),
    }
}

fn answer_list(ctx: &Context, view: fn(&Context, &Flavor) -> Value) -> Result<Json, ApiError> {
    let wanted = wanted_public(ctx)?;
    let (min_disk, min_ram) = (ctx.query.u64("minDisk")?, ctx.query.u64("minRam")?);
    let admin = ctx.is_admin();
    let flavors: Vec<&Flavor> = ctx
        .state
        .compute
        .flavors
        .values()
        .filter(|flavor| sees(ctx, flavor))
        .filter(|flavor| !admin || wanted.is_none_or(|wanted| flavor.is_public == wanted))
        .filter(|flavor| min_disk.is_none_or(|least| flavor.root_gib >= least))
        .filter(|flavor| min_ram.is_none_or(|least| flavor.ram_mib >= least))
        .collect();
    let slice = ctx.query.page()?.cut(flavors, |flavor| flavor.id.as_str())?;
    let views: Vec<Value> = slice.items.iter().map(|flavor| view(ctx, flavor)).collect();
    let mut body = json!({"flavors": views});
    if let Some(links) = slice.links(&ctx.self_url(), &ctx.query) {
        body["flavors_links"] = links;
    }
    Ok(Json::ok(body))
}

async fn list(ctx: Context) -> Result<Json, ApiError> {
    answer_list(&ctx, short_view)
}

async fn detail(ctx: Context) -> Result<Json, ApiError> {
    answer_list(&ctx, flavor_view)
}

async fn show(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    Ok(Json::ok(json!({"flavor": flavor_view(&ctx, find(&ctx, &id)?)})))
}

/// A number from 1 (or 0) to what fits Nova's 32 bits.
fn amount(field: &str, value: Option<u64>, least: u64) -> Result<u64, ApiError> {
    let value = value.unwrap_or(0);
    if value < least || value > i32::MAX as u64 {
        return Err(ApiError::bad_request(format!(
            "Invalid input for field/attribute {field}. Value: {value}. It is from {least} to {}.",
            i32::MAX
        )));
    }
    Ok(value)
}

fn flavor_id(ctx: &Context, given: Option<Value>) -> Result<FlavorId, ApiError> {
    let text = match given {
        None | Some(Value::Null) => return Ok(FlavorId::from(ctx.mint())),
        Some(Value::String(text)) if text == "auto" => return Ok(FlavorId::from(ctx.mint())),
        Some(Value::String(text)) => text,
        Some(Value::Number(number)) => number.to_string(),
        Some(other) => {
            return Err(ApiError::bad_request(format!(
                "Invalid input for field/attribute id. Value: {other}."
            )));
        }
    };
    let allowed = |c: char| c.is_alphanumeric() || matches!(c, ' ' | '.' | '-' | '_');
    if text.is_empty() || text.len() > 255 || text.trim() != text || !text.chars().all(allowed) {
        return Err(ApiError::bad_request(format!(
            "Invalid input for field/attribute id. Value: {text}."
        )));
    }
    Ok(FlavorId::from(text))
}

fn factor(value: Option<Value>) -> Result<f64, ApiError> {
    let number = match &value {
        None | Some(Value::Null) => Some(1.0),
        Some(Value::Number(number)) => number.as_f64(),
        Some(Value::String(text)) => text.parse().ok(),
        Some(_) => None,
    };
    number.filter(|factor: &f64| factor.is_finite() && *factor > 0.0).ok_or_else(|| {
        ApiError::bad_request("Invalid input for field/attribute rxtx_factor.".to_owned())
    })
}

async fn create(ctx: Context, Body(request): Body<CreateRequest>) -> Result<Json, ApiError> {
    let fields = request.flavor;
    super::check_name("name", &fields.name)?;
    let flavor = Flavor {
        id: flavor_id(&ctx, fields.id)?,
        name: fields.name.trim().to_owned(),
        description: fields.description,
        vcpus: u32::try_from(amount("vcpus", fields.vcpus, 1)?).unwrap_or(u32::MAX),
        ram_mib: amount("ram", fields.ram, 1)?,
        root_gib: amount("disk", fields.disk, 0)?,
        ephemeral_gib: amount("OS-FLV-EXT-DATA:ephemeral", fields.ephemeral, 0)?,
        swap_mib: amount("swap", fields.swap, 0)?,
        rxtx_factor: factor(fields.rxtx_factor)?,
        is_public: fields.is_public.unwrap_or(true),
        disabled: false,
        projects: BTreeSet::new(),
        extra_specs: BTreeMap::new(),
    };
    propose(&ctx, ComputeCommand::CreateFlavor(Box::new(flavor))).await
}

async fn propose(ctx: &Context, command: ComputeCommand) -> Result<Json, ApiError> {
    match ctx.propose(Command::Compute(command)).await? {
        Outcome::Flavor(flavor) => Ok(Json::ok(json!({"flavor": flavor_view(ctx, &flavor)}))),
        other => Err(unexpected(&other)),
    }
}

async fn update(
    ctx: Context,
    Path(id): Path<String>,
    Body(request): Body<UpdateRequest>,
) -> Result<Json, ApiError> {
    ctx.require_version(2, 55)?;
    let id = find(&ctx, &id)?.id.clone();
    let description = request.flavor.description;
    propose(&ctx, ComputeCommand::UpdateFlavor { id, description }).await
}

async fn remove(ctx: Context, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    ctx.propose(Command::Compute(ComputeCommand::DeleteFlavor(FlavorId::from(id)))).await?;
    Ok(StatusCode::ACCEPTED)
}

fn access_view(flavor: &Flavor) -> Value {
    let views = flavor.projects.iter();
    let views: Vec<Value> =
        views.map(|project| json!({"flavor_id": flavor.id, "tenant_id": project})).collect();
    json!({"flavor_access": views})
}

async fn access(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    let flavor = find(&ctx, &id)?;
    if flavor.is_public {
        let message = "Access list not available for public flavors.";
        return Err(ApiError::new(ErrorKind::NotFound, message));
    }
    Ok(Json::ok(access_view(flavor)))
}

async fn action(
    ctx: Context,
    Path(id): Path<String>,
    Body(request): Body<Map<String, Value>>,
) -> Result<Json, ApiError> {
    let (allowed, argument) = match request.iter().next() {
        Some((name, argument)) if name == "addTenantAccess" => (true, argument),
        Some((name, argument)) if name == "removeTenantAccess" => (false, argument),
        _ => return Err(ApiError::bad_request("There is no such action.")),
    };
    let project = argument["tenant"].as_str().unwrap_or_default();
    if !ctx.state.identity.projects.contains_key(project) {
        let message = format!("Project ID {project} is not a valid project.");
        return Err(ApiError::bad_request(message));
    }
    let id = find(&ctx, &id)?.id.clone();
    let project_id = ProjectId::from(project);
    let command = ComputeCommand::SetFlavorAccess { id, project_id, allowed };
    match ctx.propose(Command::Compute(command)).await? {
        Outcome::Flavor(flavor) => Ok(Json::ok(access_view(&flavor))),
        other => Err(unexpected(&other)),
    }
}

async fn specs(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    Ok(Json::ok(json!({"extra_specs": find(&ctx, &id)?.extra_specs})))
}

async fn spec(ctx: Context, Path((id, key)): Path<(String, String)>) -> Result<Json, ApiError> {
    let value = find(&ctx, &id)?.extra_specs.get(&key);
    let value = value.ok_or_else(|| ApiError::not_found("extra_spec", &key))?;
    Ok(Json::ok(json!({key: value})))
}

fn spec_values(given: BTreeMap<String, Value>) -> Result<BTreeMap<String, String>, ApiError> {
    let allowed = |c: char| c.is_alphanumeric() || matches!(c, ' ' | '.' | '-' | '_' | ':');
    given
        .into_iter()
        .map(|(key, value)| {
            let text = match value {
                Value::String(text) => Some(text),
                Value::Number(number) => Some(number.to_string()),
                _ => None,
            };
            let good = !key.is_empty() && key.len() <= 255 && key.chars().all(allowed);
            text.filter(|text| good && text.len() <= 255)
                .map(|text| (key.clone(), text))
                .ok_or_else(|| {
                    ApiError::bad_request(format!("Invalid extra specification {key:?}."))
                })
        })
        .collect()
}

async fn change_specs(
    ctx: &Context,
    id: &str,
    set: BTreeMap<String, String>,
    remove: BTreeSet<String>,
) -> Result<(), ApiError> {
    let flavor = find(ctx, id)?;
    if flavor.extra_specs.len() + set.len() > EXTRA_SPECS_MAX {
        let message = format!("A flavor has at most {EXTRA_SPECS_MAX} extra specifications.");
        return Err(ApiError::bad_request(message));
    }
    let id = flavor.id.clone();
    ctx.propose(Command::Compute(ComputeCommand::SetFlavorExtraSpecs { id, set, remove })).await?;
    Ok(())
}

async fn set_specs(
    ctx: Context,
    Path(id): Path<String>,
    Body(request): Body<SpecsRequest>,
) -> Result<Json, ApiError> {
    let set = spec_values(request.extra_specs)?;
    let answer = json!({"extra_specs": set});
    change_specs(&ctx, &id, set, BTreeSet::new()).await?;
    Ok(Json::ok(answer))
}

async fn set_spec(
    ctx: Context,
    Path((id, key)): Path<(String, String)>,
    Body(request): Body<BTreeMap<String, Value>>,
) -> Result<Json, ApiError> {
    if request.len() != 1 || !request.contains_key(&key) {
        return Err(ApiError::bad_request("Request body and URI mismatch"));
    }
    let set = spec_values(request)?;
    let answer = json!(set);
    change_specs(&ctx, &id, set, BTreeSet::new()).await?;
    Ok(Json::ok(answer))
}

async fn drop_spec(
    ctx: Context,
    Path((id, key)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    if !find(&ctx, &id)?.extra_specs.contains_key(&key) {
        return Err(ApiError::not_found("extra_spec", &key));
    }
    change_specs(&ctx, &id, BTreeMap::new(), BTreeSet::from([key])).await?;
    Ok(StatusCode::OK)
}
