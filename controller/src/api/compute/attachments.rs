//! `/v2.1/servers/{id}/os-volume_attachments`.

use axum::extract::Path;
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::body::{Body, Json};
use super::super::context::Context;
use super::super::error::{ApiError, ErrorKind};
use super::super::routes::Routes;
use super::super::{policy, unexpected};
use super::find_server;
use crate::ids::{AttachmentId, ServerId, VolumeId, derived_id};
use crate::state::volume::{Attachment, VolumeCommand};
use crate::state::{Command, Outcome};

pub(super) fn routes() -> Routes {
    const ALL: &str = "/v2.1/servers/{id}/os-volume_attachments";
    const ONE: &str = "/v2.1/servers/{id}/os-volume_attachments/{volume}";
    Routes::new(super::PREFIX)
        .get(ALL, policy::ATTACHMENT_LIST, list)
        .post(ALL, policy::ATTACHMENT_CREATE, create)
        .get(ONE, policy::ATTACHMENT_GET, show)
        .delete(ONE, policy::ATTACHMENT_DELETE, remove)
}

#[derive(Deserialize)]
struct CreateRequest {
    #[serde(rename = "volumeAttachment")]
    attachment: AttachmentFields,
}

#[derive(Deserialize)]
struct AttachmentFields {
    #[serde(rename = "volumeId")]
    volume_id: String,
    device: Option<String>,
    tag: Option<String>,
    delete_on_termination: Option<bool>,
}

fn attachment_view(
    ctx: &Context,
    server: &ServerId,
    volume: &VolumeId,
    attachment: &Attachment,
) -> Value {
    let mut view = json!({
        "serverId": server, "volumeId": volume, "device": attachment.device,
    });
    if ctx.at_least(2, 70) {
        view["tag"] = json!(attachment.tag);
    }
    if ctx.at_least(2, 79) {
        view["delete_on_termination"] = json!(attachment.delete_on_termination);
    }
    if ctx.at_least(2, 89) {
        view["attachment_id"] = json!(attachment.id);
        view["bdm_uuid"] = json!(derived_id("block device", attachment.id.as_str()));
    } else {
        view["id"] = json!(volume);
    }
    view
}

async fn list(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    let server = find_server(&ctx, &id)?;
    let views: Vec<Value> = ctx
        .state
        .attachments_of_server(&server.id)
        .map(|(volume, attachment)| attachment_view(&ctx, &server.id, &volume.id, attachment))
        .collect();
    Ok(Json::ok(json!({"volumeAttachments": views})))
}

fn not_attached(id: &ServerId, volume: &str) -> ApiError {
    let message = format!("Instance {id} is not attached to volume {volume}.");
    ApiError::new(ErrorKind::NotFound, message)
}

async fn show(ctx: Context, Path((id, volume)): Path<(String, String)>) -> Result<Json, ApiError> {
    let server = find_server(&ctx, &id)?;
    let mut attached = ctx.state.attachments_of_server(&server.id);
    let found = attached.find(|(one, _)| one.id.as_str() == volume);
    let (found, attachment) = found.ok_or_else(|| not_attached(&server.id, &volume))?;
    let view = attachment_view(&ctx, &server.id, &found.id, attachment);
    Ok(Json::ok(json!({"volumeAttachment": view})))
}

/// What Nova says when Cinder has said no: a bad request.
fn as_nova(mut error: ApiError) -> ApiError {
    let of_volume = error.resource.as_deref() == Some("volume");
    if of_volume && matches!(error.kind, ErrorKind::InUse | ErrorKind::InvalidState) {
        error.kind = ErrorKind::BadRequest;
        error.message = format!("Invalid volume: {}", error.message);
    }
    error
}

async fn create(
    ctx: Context,
    Path(id): Path<String>,
    Body(request): Body<CreateRequest>,
) -> Result<Json, ApiError> {
    let server = find_server(&ctx, &id)?;
    let fields = request.attachment;
    let volume = ctx.state.volume.volumes.get(fields.volume_id.as_str());
    let volume = volume
        .filter(|volume| ctx.sees(&volume.project_id))
        .ok_or_else(|| ApiError::not_found("volume", &fields.volume_id))?;
    let command = VolumeCommand::Attach {
        volume_id: volume.id.clone(),
        server_id: server.id.clone(),
        attachment_id: AttachmentId::from(ctx.mint()),
        device: fields.device.filter(|device| !device.is_empty()),
        tag: fields.tag.filter(|_| ctx.at_least(2, 49)),
        delete_on_termination: fields.delete_on_termination.unwrap_or(false),
    };
    match ctx.propose(Command::Volume(command)).await.map_err(as_nova)? {
        Outcome::Attachment(attachment) => {
            let view = attachment_view(&ctx, &server.id, &volume.id, &attachment);
            Ok(Json::ok(json!({"volumeAttachment": view})))
        }
        other => Err(unexpected(&other)),
    }
}

async fn remove(
    ctx: Context,
    Path((id, volume)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    let server = find_server(&ctx, &id)?;
    let mut attached = ctx.state.attachments_of_server(&server.id);
    if !attached.any(|(one, _)| one.id.as_str() == volume) {
        return Err(not_attached(&server.id, &volume));
    }
    let command =
        VolumeCommand::Detach { volume_id: VolumeId::from(volume), server_id: server.id.clone() };
    ctx.propose(Command::Volume(command)).await.map_err(as_nova)?;
    Ok(StatusCode::ACCEPTED)
}
