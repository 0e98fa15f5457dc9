//! `/v2/images`: what is known of images.

use std::collections::{BTreeMap, BTreeSet};

use axum::extract::Path;
use axum::response::{IntoResponse, Response};
use http::header::LOCATION;
use http::{HeaderValue, StatusCode};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::super::body::{Body, Json};
use super::super::context::Context;
use super::super::error::{ApiError, ErrorKind};
use super::super::policy;
use super::super::query::Params;
use super::super::routes::Routes;
use super::view::{BASE_FIELDS, image_view};
use super::{find, find_own, patch};
use crate::ids::{ImageId, ProjectId};
use crate::state::image::{Image, ImageCommand, ImageUpdate, NewImage, Visibility};
use crate::state::{Command, Outcome};

pub(super) const NAME_MAX: usize = 255;
pub(super) const TAGS_MAX: usize = 128;
pub(super) const PROPERTIES_MAX: usize = 128;
pub(super) const PROPERTY_BYTES_MAX: usize = 65_535;

/// Disk formats that Glance knows; what the bytes are is found out from them, not believed.
const DISK_FORMATS: &[&str] =
    &["ami", "ari", "aki", "vhd", "vhdx", "vmdk", "raw", "qcow2", "vdi", "iso", "ploop"];
const CONTAINER_FORMATS: &[&str] =
    &["ami", "ari", "aki", "bare", "ovf", "ova", "docker", "compressed"];

pub(super) fn routes() -> Routes {
    Routes::new(super::PREFIX)
        .get("/v2/images", policy::IMAGE_LIST, list)
        .post("/v2/images", policy::IMAGE_CREATE, create)
        .get("/v2/images/{id}", policy::IMAGE_GET, show)
        .patch("/v2/images/{id}", policy::IMAGE_UPDATE, update)
        .delete("/v2/images/{id}", policy::IMAGE_DELETE, remove)
        .put("/v2/images/{id}/tags/{tag}", policy::IMAGE_UPDATE, add_tag)
        .delete("/v2/images/{id}/tags/{tag}", policy::IMAGE_UPDATE, remove_tag)
}

#[derive(Deserialize)]
struct CreateRequest {
    id: Option<String>,
    name: Option<String>,
    disk_format: Option<String>,
    container_format: Option<String>,
    visibility: Option<String>,
    protected: Option<bool>,
    os_hidden: Option<bool>,
    min_disk: Option<u64>,
    min_ram: Option<u64>,
    tags: Option<BTreeSet<String>>,
    owner: Option<String>,
    #[serde(flatten)]
    properties: Map<String, Value>,
}

pub(super) fn visibility(word: &str) -> Result<Visibility, ApiError> {
    [Visibility::Public, Visibility::Community, Visibility::Shared, Visibility::Private]
        .into_iter()
        .find(|visibility| visibility.as_str() == word)
        .ok_or_else(|| ApiError::bad_request(format!("There is no visibility {word:?}.")))
}

/// Only an administrator shows an image to everybody.
pub(super) fn may_have(ctx: &Context, visibility: Visibility) -> Result<(), ApiError> {
    match visibility {
        Visibility::Public => ctx.require_admin("publicize_image"),
        _ => Ok(()),
    }
}

pub(super) fn check_format(field: &str, known: Option<&String>) -> Result<(), ApiError> {
    let Some(format) = known else { return Ok(()) };
    let formats = if field == "disk_format" { DISK_FORMATS } else { CONTAINER_FORMATS };
    if formats.contains(&format.as_str()) {
        return Ok(());
    }
    Err(ApiError::bad_request(format!(
        "Invalid {field} '{format}': it is one of {}.",
        formats.join(", ")
    )))
}

/// Checks a free property and answers its value as text.
pub(super) fn property(name: &str, value: &Value) -> Result<String, ApiError> {
    if BASE_FIELDS.contains(&name) {
        return Err(ApiError::forbidden(format!("Attribute '{name}' is read-only.")));
    }
    let text = value.as_str().ok_or_else(|| {
        ApiError::bad_request(format!("The property '{name}' has to be a text, not {value}."))
    })?;
    if name.is_empty() || name.len() > NAME_MAX || text.len() > PROPERTY_BYTES_MAX {
        return Err(ApiError::bad_request(format!("The property '{name}' is too long.")));
    }
    Ok(text.to_owned())
}

pub(super) fn check_bounds(
    name: Option<&str>,
    tags: &BTreeSet<String>,
    properties: &BTreeMap<String, String>,
) -> Result<(), ApiError> {
    if name.is_some_and(|name| name.chars().count() > NAME_MAX) {
        return Err(ApiError::bad_request(format!("A name has at most {NAME_MAX} characters.")));
    }
    let long = tags.iter().any(|tag| tag.chars().count() > NAME_MAX);
    if long || tags.len() > TAGS_MAX || properties.len() > PROPERTIES_MAX {
        return Err(ApiError::new(
            ErrorKind::TooLarge,
            format!("An image has at most {TAGS_MAX} tags and {PROPERTIES_MAX} properties."),
        ));
    }
    Ok(())
}

fn new_id(ctx: &Context, asked: Option<String>) -> Result<ImageId, ApiError> {
    let Some(asked) = asked else { return Ok(ImageId::from(ctx.mint())) };
    let id = uuid::Uuid::parse_str(&asked)
        .map_err(|_| ApiError::bad_request(format!("Invalid image id format: {asked}")))?;
    Ok(ImageId::from(id.hyphenated().to_string()))
}

async fn create(ctx: Context, Body(request): Body<CreateRequest>) -> Result<Response, ApiError> {
    check_format("disk_format", request.disk_format.as_ref())?;
    check_format("container_format", request.container_format.as_ref())?;
    let visibility = visibility(request.visibility.as_deref().unwrap_or("shared"))?;
    may_have(&ctx, visibility)?;
    let owner = match request.owner {
        Some(owner) if !ctx.owns(&ProjectId::from(owner.clone())) => {
            ctx.require_admin("add_image")?;
            ProjectId::from(owner)
        }
        _ => ctx.project_id()?,
    };
    let properties = request.properties.iter().filter(|(_, value)| !value.is_null());
    let properties = properties
        .map(|(name, value)| Ok((name.clone(), property(name, value)?)))
        .collect::<Result<BTreeMap<_, _>, ApiError>>()?;
    let tags = request.tags.unwrap_or_default();
    check_bounds(request.name.as_deref(), &tags, &properties)?;
    let command = ImageCommand::Create(Box::new(NewImage {
        id: new_id(&ctx, request.id)?,
        name: request.name,
        owner: Some(owner),
        disk_format: request.disk_format,
        container_format: request.container_format,
        visibility,
        protected: request.protected.unwrap_or(false),
        hidden: request.os_hidden.unwrap_or(false),
        min_disk: request.min_disk.unwrap_or(0),
        min_ram: request.min_ram.unwrap_or(0),
        tags,
        properties,
    }));
    let image = changed(ctx.propose(Command::Image(command)).await?)?;
    let mut response = Json::created(image_view(&image)).into_response();
    let location = ctx.url(&format!("/image/v2/images/{}", image.id));
    if let Ok(location) = HeaderValue::from_str(&location) {
        response.headers_mut().insert(LOCATION, location);
    }
    Ok(response)
}

fn changed(outcome: Outcome) -> Result<Image, ApiError> {
    match outcome {
        Outcome::Image(image) => Ok(*image),
        other => Err(super::super::unexpected(&other)),
    }
}

async fn show(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    Ok(Json::ok(image_view(find(&ctx, &id)?)))
}

async fn update(
    ctx: Context,
    Path(id): Path<String>,
    Body(operations): Body<Vec<patch::Operation>>,
) -> Result<Json, ApiError> {
    let image = find_own(&ctx, &id)?;
    let update = patch::apply(&ctx, image, &operations)?;
    let outcome = ctx.propose(Command::Image(ImageCommand::Update(Box::new(update)))).await?;
    Ok(Json::ok(image_view(&changed(outcome)?)))
}

async fn remove(ctx: Context, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let id = find_own(&ctx, &id)?.id.clone();
    ctx.propose(Command::Image(ImageCommand::Delete(id))).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn retag(
    ctx: &Context,
    id: &str,
    change: impl FnOnce(&mut BTreeSet<String>) -> bool,
) -> Result<StatusCode, ApiError> {
    let image = find_own(ctx, id)?;
    let mut tags = image.tags.clone();
    if !change(&mut tags) {
        return Err(ApiError::new(ErrorKind::NotFound, "The image has no such tag."));
    }
    check_bounds(None, &tags, &BTreeMap::new())?;
    let mut update = ImageUpdate::of(image.id.clone());
    update.tags = Some(tags);
    ctx.propose(Command::Image(ImageCommand::Update(Box::new(update)))).await?;
    Ok(StatusCode::NO_CONTENT)
}

type Tag = Path<(String, String)>;

async fn add_tag(ctx: Context, Path((id, tag)): Tag) -> Result<StatusCode, ApiError> {
    retag(&ctx, &id, |tags| {
        tags.insert(tag);
        true
    })
    .await
}

async fn remove_tag(ctx: Context, Path((id, tag)): Tag) -> Result<StatusCode, ApiError> {
    retag(&ctx, &id, |tags| tags.remove(&tag)).await
}

/// True when the default list has the image: public, the caller's own, or all of them
/// for who asks for a visibility as an administrator.
fn listed(ctx: &Context, image: &Image) -> bool {
    let own = image.owner.as_ref().is_some_and(|owner| ctx.owns(owner));
    match ctx.query.get("visibility") {
        Some("all") => super::sees(ctx, image),
        Some(wanted) if wanted != image.visibility.as_str() => false,
        Some(_) => super::sees(ctx, image),
        None => own || image.visibility == Visibility::Public || ctx.is_admin(),
    }
}

/// `size_min=`, `size_max=` and the filters that say what is shown.
fn filtered(ctx: &Context, hidden: bool) -> impl Iterator<Item = &Image> {
    let query = &ctx.query;
    let text = |field: &Option<String>| field.clone().unwrap_or_default();
    let own_fields = query.names().filter(|name| !FILTERS.contains(name));
    let own_fields: Vec<&str> = own_fields.collect();
    let images = ctx.state.image.images.values().map(AsRef::as_ref);
    images.filter(move |image: &&Image| {
        listed(ctx, image)
            && image.hidden == hidden
            && query.admits("id", image.id.as_str())
            && query.admits("name", &text(&image.name))
            && query.admits("status", image.status.as_str())
            && query.admits("owner", image.owner.as_ref().map_or("", |owner| owner.as_str()))
            && query.admits("disk_format", &text(&image.disk_format))
            && query.admits("container_format", &text(&image.container_format))
            && query.get_all("tag").all(|tag| image.tags.contains(tag))
            && own_fields.iter().all(|name| {
                image.properties.get(*name).is_some_and(|value| query.admits(name, value))
            })
    })
}

/// Query parameters that aren't free properties.
const FILTERS: &[&str] = &[
    "id",
    "name",
    "status",
    "owner",
    "disk_format",
    "container_format",
    "tag",
    "visibility",
    "os_hidden",
    "limit",
    "marker",
    "sort",
    "sort_key",
    "sort_dir",
    "size_min",
    "size_max",
    "protected",
    "member_status",
    "created_at",
    "updated_at",
    "min_disk",
    "min_ram",
];

/// `sort=name:asc,size` or `sort_key` with `sort_dir`; the newest first by default.
fn sort_keys(query: &Params) -> Result<Vec<(String, bool)>, ApiError> {
    let mut keys: Vec<(String, bool)> = Vec::new();
    if let Some(sort) = query.get("sort") {
        for part in sort.split(',') {
            let (key, direction) = part.split_once(':').unwrap_or((part, "desc"));
            keys.push((key.to_owned(), direction != "asc"));
        }
    } else {
        let directions: Vec<&str> = query.get_all("sort_dir").collect();
        for (index, key) in query.get_all("sort_key").enumerate() {
            let direction = directions.get(index).or(directions.last()).copied();
            keys.push((key.to_owned(), direction != Some("asc")));
        }
        if keys.is_empty() {
            keys.push(("created_at".to_owned(), directions.first() != Some(&"asc")));
        }
    }
    let known = [
        "name",
        "status",
        "container_format",
        "disk_format",
        "size",
        "id",
        "created_at",
        "updated_at",
    ];
    match keys.iter().find(|(key, _)| !known.contains(&key.as_str())) {
        Some((key, _)) => Err(ApiError::bad_request(format!("Invalid sort key: {key}"))),
        None => Ok(keys),
    }
}

fn sort_value(image: &Image, key: &str) -> (u64, String) {
    let size = image.content.as_ref().map_or(0, |content| content.size_bytes);
    match key {
        "name" => (0, image.name.clone().unwrap_or_default()),
        "status" => (0, image.status.as_str().to_owned()),
        "container_format" => (0, image.container_format.clone().unwrap_or_default()),
        "disk_format" => (0, image.disk_format.clone().unwrap_or_default()),
        "size" => (size, String::new()),
        "created_at" => (image.created_ms, String::new()),
        "updated_at" => (image.updated_ms, String::new()),
        _ => (0, image.id.to_string()),
    }
}

async fn list(ctx: Context) -> Result<Json, ApiError> {
    let hidden = ctx.query.bool("os_hidden")?.unwrap_or(false);
    let protected = ctx.query.bool("protected")?;
    let (smallest, largest) = (ctx.query.u64("size_min")?, ctx.query.u64("size_max")?);
    let size = |image: &Image| image.content.as_ref().map(|content| content.size_bytes);
    let mut images: Vec<&Image> = filtered(&ctx, hidden)
        .filter(|image| protected.is_none_or(|wanted| image.protected == wanted))
        .filter(|image| smallest.is_none_or(|least| size(image).is_some_and(|s| s >= least)))
        .filter(|image| largest.is_none_or(|most| size(image).is_some_and(|s| s <= most)))
        .collect();
    let keys = sort_keys(&ctx.query)?;
    images.sort_by(|one, two| {
        let by_key = keys.iter().map(|(key, descending)| {
            let order = sort_value(one, key).cmp(&sort_value(two, key));
            if *descending { order.reverse() } else { order }
        });
        by_key.fold(std::cmp::Ordering::Equal, std::cmp::Ordering::then).then(one.id.cmp(&two.id))
    });
    let slice = ctx.query.page()?.cut(images, |image| image.id.as_str())?;
    let mut body = json!({
        "images": slice.items.iter().map(|image| image_view(image)).collect::<Vec<_>>(),
        "first": "/v2/images",
        "schema": "/v2/schemas/images",
    });
    if let Some(links) = slice.links("/v2/images", &ctx.query) {
        body["next"] = links[0]["href"].clone();
    }
    Ok(Json::ok(body))
}
