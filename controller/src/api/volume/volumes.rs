//! Volumes.

use std::collections::BTreeMap;

use axum::extract::Path;
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::body::{Body, Json, lenient_bool, lenient_u64, nullable};
use super::super::context::Context;
use super::super::error::ApiError;
use super::super::policy;
use super::super::routes::Routes;
use super::super::time;
use crate::ids::VolumeId;
use crate::state::volume::{Attachment, NewVolume, Volume, VolumeCommand};
use crate::state::{Command, Outcome, State};

/// The longest name, description, metadata key and value, characters.
const TEXT_MAX: usize = 255;

/// How many metadata items a volume can have.
const METADATA_MAX: usize = 128;

pub(super) fn routes() -> Routes {
    let one = "/v3/{project}/volumes/{id}";
    let metadata = "/v3/{project}/volumes/{id}/metadata";
    let item = "/v3/{project}/volumes/{id}/metadata/{key}";
    Routes::new(super::PREFIX)
        .get("/v3/{project}/volumes", policy::VOLUME_LIST, list)
        .get("/v3/{project}/volumes/detail", policy::VOLUME_LIST, detail)
        .post("/v3/{project}/volumes", policy::VOLUME_CREATE, create)
        .get(one, policy::VOLUME_GET, show)
        .put(one, policy::VOLUME_UPDATE, update)
        .delete(one, policy::VOLUME_DELETE, remove)
        .post("/v3/{project}/volumes/{id}/action", policy::VOLUME_ACTION, action)
        .get(metadata, policy::VOLUME_METADATA_GET, show_metadata)
        .post(metadata, policy::VOLUME_METADATA_CHANGE, add_metadata)
        .put(metadata, policy::VOLUME_METADATA_CHANGE, replace_metadata)
        .delete(item, policy::VOLUME_METADATA_CHANGE, remove_metadata)
}

#[derive(Deserialize)]
struct CreateRequest {
    volume: CreateFields,
}

/// Clients send every field, `null` where it isn't meant.
#[derive(Deserialize)]
struct CreateFields {
    name: Option<String>,
    display_name: Option<String>,
    description: Option<String>,
    display_description: Option<String>,
    #[serde(default, deserialize_with = "lenient_u64")]
    size: Option<u64>,
    availability_zone: Option<String>,
    metadata: Option<BTreeMap<String, String>>,
    volume_type: Option<String>,
    #[serde(rename = "imageRef")]
    image_ref: Option<String>,
    snapshot_id: Option<String>,
    source_volid: Option<String>,
    backup_id: Option<String>,
    consistencygroup_id: Option<String>,
    #[serde(default, deserialize_with = "lenient_bool")]
    multiattach: Option<bool>,
}

impl CreateFields {
    /// Refuses what isn't served, rather than leave it out in silence.
    fn check(&self) -> Result<(), ApiError> {
        let sources = [
            ("imageRef", &self.image_ref),
            ("snapshot_id", &self.snapshot_id),
            ("source_volid", &self.source_volid),
            ("backup_id", &self.backup_id),
            ("consistencygroup_id", &self.consistencygroup_id),
            ("volume_type", &self.volume_type),
        ];
        let named = |(_, value): &(&str, &Option<String>)| {
            value.as_ref().is_some_and(|value| !value.is_empty())
        };
        if let Some((field, _)) = sources.into_iter().find(named) {
            return Err(ApiError::bad_request(format!(
                "Invalid input: a volume can't be made with {field} yet; make an empty one."
            )));
        }
        if self.multiattach == Some(true) {
            return Err(ApiError::bad_request("Invalid input: multiattach is not supported."));
        }
        for value in [&self.name, &self.display_name, &self.description, &self.display_description]
        {
            text(value.as_deref())?;
        }
        metadata(self.metadata.as_ref())
    }
}

fn text(value: Option<&str>) -> Result<(), ApiError> {
    match value {
        Some(value) if value.chars().count() > TEXT_MAX => Err(ApiError::bad_request(format!(
            "Invalid input: name or description has more than {TEXT_MAX} characters."
        ))),
        _ => Ok(()),
    }
}

fn metadata(items: Option<&BTreeMap<String, String>>) -> Result<(), ApiError> {
    let Some(items) = items else { return Ok(()) };
    let long = |(key, value): (&String, &String)| {
        key.is_empty() || key.chars().count() > TEXT_MAX || value.chars().count() > TEXT_MAX
    };
    if items.len() > METADATA_MAX || items.iter().any(long) {
        return Err(ApiError::bad_request(format!(
            "Invalid volume metadata: at most {METADATA_MAX} items of 1 to {TEXT_MAX} characters."
        )));
    }
    Ok(())
}

/// A volume that is the caller's, in a request whose path names the caller's project.
fn owned<'a>(ctx: &'a Context, project: &str, id: &str) -> Result<&'a Volume, ApiError> {
    super::project(ctx, project)?;
    let volume = ctx.state.volume.volumes.get(id).filter(|volume| ctx.sees(&volume.project_id));
    volume.map(AsRef::as_ref).ok_or_else(|| ApiError::not_found("volume", id))
}

fn links(ctx: &Context, volume: &Volume) -> Value {
    let path = format!("/v3/{}/volumes/{}", volume.project_id, volume.id);
    json!([
        {"rel": "self", "href": ctx.url(&format!("/volume{path}"))},
        {"rel": "bookmark", "href": ctx.url(&format!("/volume{path}"))},
    ])
}

fn attachment_view(state: &State, volume: &Volume, attachment: &Attachment) -> Value {
    let host = attachment.host.and_then(|host| state.cluster.hosts.get(&host));
    json!({
        "id": volume.id,
        "attachment_id": attachment.id,
        "volume_id": volume.id,
        "server_id": attachment.server_id,
        "host_name": host.map(|host| &host.name),
        "device": attachment.device,
        "attached_at": time::micros_naive(attachment.attached_ms),
    })
}

fn view(ctx: &Context, volume: &Volume) -> Value {
    let attachments: Vec<Value> = volume
        .attachments
        .iter()
        .map(|attachment| attachment_view(&ctx.state, volume, attachment))
        .collect();
    let mut view = json!({
        "id": volume.id,
        "name": volume.name,
        "description": volume.description,
        "status": volume.status.as_str(),
        "size": volume.size_gib,
        "availability_zone": volume.availability_zone,
        "created_at": time::micros_naive(volume.created_ms),
        "updated_at": time::micros_naive(volume.updated_ms),
        "attachments": attachments,
        "metadata": volume.metadata,
        "bootable": if volume.bootable { "true" } else { "false" },
        "encrypted": false,
        "multiattach": false,
        "replication_status": null,
        "consistencygroup_id": null,
        "snapshot_id": null,
        "source_volid": null,
        "volume_type": null,
        "user_id": volume.user_id,
        "os-vol-tenant-attr:tenant_id": volume.project_id,
        "links": links(ctx, volume),
    });
    if let (true, Some(fields)) = (ctx.is_admin(), view.as_object_mut()) {
        let home = volume.home.and_then(|home| ctx.state.cluster.hosts.get(&home));
        let home = home.map(|home| format!("{}@local#local", home.name));
        fields.insert("os-vol-host-attr:host".into(), json!(home));
        fields.insert("os-vol-mig-status-attr:migstat".into(), Value::Null);
        fields.insert("os-vol-mig-status-attr:name_id".into(), Value::Null);
    }
    view
}

fn answer(ctx: &Context, outcome: &Outcome) -> Result<Value, ApiError> {
    match outcome {
        Outcome::Volume(volume) => Ok(json!({"volume": view(ctx, volume)})),
        other => Err(super::unexpected(other)),
    }
}

/// The caller's volumes that pass the query's filters, newest first.
fn wanted<'a>(ctx: &'a Context, project: &str) -> Result<Vec<&'a Volume>, ApiError> {
    super::project(ctx, project)?;
    let mut volumes = Vec::new();
    for volume in ctx.state.volume.volumes.values() {
        let bootable = if volume.bootable { "true" } else { "false" };
        let passes = ctx.query.admits("name", &volume.name)
            && ctx.query.admits("id", volume.id.as_str())
            && ctx.query.admits("status", volume.status.as_str())
            && ctx.query.admits("availability_zone", &volume.availability_zone)
            && ctx.query.admits("size", &volume.size_gib.to_string())
            && ctx.query.get("bootable").is_none_or(|b| b.eq_ignore_ascii_case(bootable))
            && has_metadata(ctx, volume);
        if passes && ctx.lists(&volume.project_id)? {
            volumes.push(volume.as_ref());
        }
    }
    volumes.sort_by_key(|volume| std::cmp::Reverse(volume.created_ms));
    Ok(volumes)
}

/// `metadata={"key": "value"}`, also in the notation of Python that clients send.
fn has_metadata(ctx: &Context, volume: &Volume) -> bool {
    let Some(text) = ctx.query.get("metadata") else { return true };
    let wanted =
        serde_json::from_str(text).or_else(|_| serde_json::from_str(&text.replace('\'', "\"")));
    let wanted: Option<BTreeMap<String, String>> = wanted.ok();
    wanted.is_some_and(|wanted| {
        wanted.iter().all(|(key, value)| volume.metadata.get(key) == Some(value))
    })
}

/// The sorted part of a list that the query asks for.
fn page(ctx: &Context, mut views: Vec<Value>) -> Result<Value, ApiError> {
    super::sort(ctx, &mut views);
    let slice = ctx.query.page()?.cut(views, |view| view["id"].as_str().unwrap_or_default())?;
    let links = slice.links(&ctx.self_url(), &ctx.query);
    let mut body = json!({"volumes": slice.items});
    if let (Some(links), Some(body)) = (links, body.as_object_mut()) {
        body.insert("volumes_links".into(), links);
    }
    Ok(body)
}

async fn list(ctx: Context, Path(project): Path<String>) -> Result<Json, ApiError> {
    let volumes = wanted(&ctx, &project)?;
    let brief = |volume: &&Volume| json!({"id": volume.id, "name": volume.name, "links": links(&ctx, volume)});
    Ok(Json::ok(page(&ctx, volumes.iter().map(brief).collect())?))
}

async fn detail(ctx: Context, Path(project): Path<String>) -> Result<Json, ApiError> {
    let volumes = wanted(&ctx, &project)?;
    let views = volumes.into_iter().map(|volume| view(&ctx, volume)).collect();
    Ok(Json::ok(page(&ctx, views)?))
}

async fn show(ctx: Context, Path((project, id)): Path<(String, String)>) -> Result<Json, ApiError> {
    let volume = owned(&ctx, &project, &id)?;
    Ok(Json::ok(json!({"volume": view(&ctx, volume)})))
}

async fn create(
    ctx: Context,
    Path(project): Path<String>,
    Body(request): Body<CreateRequest>,
) -> Result<Json, ApiError> {
    let project_id = super::project(&ctx, &project)?;
    let fields = request.volume;
    fields.check()?;
    let size_gib = fields.size.filter(|size| *size > 0).ok_or_else(|| {
        ApiError::bad_request("Invalid input for field/attribute size: it must be 1 or more GiB.")
    })?;
    let zone = fields.availability_zone.filter(|zone| !zone.is_empty());
    let known = |zone: &String| {
        ctx.state.cluster.hosts.values().any(|host| host.availability_zone == *zone)
    };
    if let Some(zone) = zone.as_ref().filter(|zone| !known(zone)) {
        let message = format!("Invalid input received: Availability zone '{zone}' is invalid.");
        return Err(ApiError::bad_request(message));
    }
    let command = VolumeCommand::Create(Box::new(NewVolume {
        id: VolumeId::from(ctx.mint()),
        name: fields.name.or(fields.display_name).unwrap_or_default(),
        description: fields.description.or(fields.display_description),
        project_id,
        user_id: ctx.user_id(),
        size_gib,
        metadata: fields.metadata.unwrap_or_default(),
        availability_zone: zone,
        placement: None,
    }));
    let outcome = ctx.propose(Command::Volume(command)).await?;
    Ok(Json::accepted(answer(&ctx, &outcome)?))
}

#[derive(Deserialize)]
struct UpdateRequest {
    volume: UpdateFields,
}

#[derive(Deserialize)]
struct UpdateFields {
    name: Option<String>,
    display_name: Option<String>,
    #[serde(default, deserialize_with = "nullable")]
    description: Option<Option<String>>,
    metadata: Option<BTreeMap<String, String>>,
}

async fn update(
    ctx: Context,
    Path((project, id)): Path<(String, String)>,
    Body(request): Body<UpdateRequest>,
) -> Result<Json, ApiError> {
    owned(&ctx, &project, &id)?;
    let fields = request.volume;
    let name = fields.name.or(fields.display_name);
    text(name.as_deref())?;
    text(fields.description.as_ref().and_then(|text| text.as_deref()))?;
    metadata(fields.metadata.as_ref())?;
    let outcome = change(&ctx, id, name, fields.description, fields.metadata, None).await?;
    Ok(Json::ok(answer(&ctx, &outcome)?))
}

async fn change(
    ctx: &Context,
    id: String,
    name: Option<String>,
    description: Option<Option<String>>,
    metadata: Option<BTreeMap<String, String>>,
    bootable: Option<bool>,
) -> Result<Outcome, ApiError> {
    let id = VolumeId::from(id);
    let command = VolumeCommand::Update { id, name, description, metadata, bootable };
    ctx.propose(Command::Volume(command)).await
}

async fn remove(
    ctx: Context,
    Path((project, id)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    owned(&ctx, &project, &id)?;
    ctx.propose(Command::Volume(VolumeCommand::Delete(VolumeId::from(id)))).await?;
    Ok(StatusCode::ACCEPTED)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ActionRequest {
    #[serde(rename = "os-set_bootable")]
    set_bootable: Bootable,
}

#[derive(Deserialize)]
struct Bootable {
    bootable: bool,
}

async fn action(
    ctx: Context,
    Path((project, id)): Path<(String, String)>,
    Body(request): Body<ActionRequest>,
) -> Result<StatusCode, ApiError> {
    owned(&ctx, &project, &id)?;
    change(&ctx, id, None, None, None, Some(request.set_bootable.bootable)).await?;
    Ok(StatusCode::OK)
}

#[derive(Deserialize)]
struct MetadataRequest {
    metadata: BTreeMap<String, String>,
}

async fn show_metadata(
    ctx: Context,
    Path((project, id)): Path<(String, String)>,
) -> Result<Json, ApiError> {
    let volume = owned(&ctx, &project, &id)?;
    Ok(Json::ok(json!({"metadata": volume.metadata})))
}

async fn set_metadata(
    ctx: &Context,
    id: String,
    items: BTreeMap<String, String>,
) -> Result<Json, ApiError> {
    metadata(Some(&items))?;
    match change(ctx, id, None, None, Some(items), None).await? {
        Outcome::Volume(volume) => Ok(Json::ok(json!({"metadata": volume.metadata}))),
        other => Err(super::unexpected(&other)),
    }
}

async fn add_metadata(
    ctx: Context,
    Path((project, id)): Path<(String, String)>,
    Body(request): Body<MetadataRequest>,
) -> Result<Json, ApiError> {
    let mut items = owned(&ctx, &project, &id)?.metadata.clone();
    items.extend(request.metadata);
    set_metadata(&ctx, id, items).await
}

async fn replace_metadata(
    ctx: Context,
    Path((project, id)): Path<(String, String)>,
    Body(request): Body<MetadataRequest>,
) -> Result<Json, ApiError> {
    owned(&ctx, &project, &id)?;
    set_metadata(&ctx, id, request.metadata).await
}

async fn remove_metadata(
    ctx: Context,
    Path((project, id, key)): Path<(String, String, String)>,
) -> Result<StatusCode, ApiError> {
    let mut items = owned(&ctx, &project, &id)?.metadata.clone();
    if items.remove(&key).is_none() {
        return Err(ApiError::not_found("metadata", &key));
    }
    set_metadata(&ctx, id, items).await?;
    Ok(StatusCode::OK)
}
