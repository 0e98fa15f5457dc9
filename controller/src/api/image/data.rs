//! `/v2/images/{id}/file`: the bytes, streamed both ways in constant memory.

use axum::body::Body;
use axum::extract::{Path, Request};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderValue, StatusCode};

use super::super::cloud::{BodyStream, UploadedImage};
use super::super::context::Context;
use super::super::error::{ApiError, ErrorKind};
use super::super::policy;
use super::super::routes::Routes;
use super::{find, find_own};
use crate::ids::ImageId;
use crate::state::image::{Image, ImageCommand, ImageStatus};
use crate::state::{Command, Outcome};

const OCTETS: &str = "application/octet-stream";

pub(super) fn routes() -> Routes {
    Routes::new(super::PREFIX).put("/v2/images/{id}/file", policy::IMAGE_UPLOAD, upload).get(
        "/v2/images/{id}/file",
        policy::IMAGE_DOWNLOAD,
        download,
    )
}

async fn upload(
    ctx: Context,
    Path(id): Path<String>,
    request: Request,
) -> Result<StatusCode, ApiError> {
    let image = find_own(&ctx, &id)?.clone();
    let kind = request.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    if kind != Some(OCTETS) {
        return Err(ApiError::new(
            ErrorKind::UnsupportedMediaType,
            format!("An image's content is sent as {OCTETS}."),
        ));
    }
    let upload = begin(&ctx, &image.id).await?;
    let body = request.into_body().into_data_stream();
    let body: BodyStream = Box::pin(body.map(|piece| piece.map_err(std::io::Error::other)));
    // A task of its own: when the client goes away this handler is dropped, but the image
    // must still return from `saving`.
    let finished = tokio::spawn(async move { store(&ctx, &image, upload, body).await }).await;
    finished
        .unwrap_or_else(|_| Err(ApiError::new(ErrorKind::Internal, "The upload was ended.")))?;
    Ok(StatusCode::NO_CONTENT)
}

/// Starts an upload; its number where the cluster counts them.
async fn begin(ctx: &Context, id: &ImageId) -> Result<Option<u64>, ApiError> {
    let begun = ImageCommand::UploadBegun { id: id.clone(), host: ctx.cloud().host() };
    if ctx.state.cluster.admits(&Command::Image(begun.clone())).is_err() {
        ctx.propose(Command::Image(ImageCommand::UploadStarted(id.clone()))).await?;
        return Ok(None);
    }
    match ctx.propose(Command::Image(begun)).await? {
        Outcome::Image(image) => Ok(Some(image.upload)),
        _ => Ok(None),
    }
}

async fn store(
    ctx: &Context,
    image: &Image,
    upload: Option<u64>,
    body: BodyStream,
) -> Result<(), ApiError> {
    match ctx.cloud().upload_image(image, body).await {
        Ok(UploadedImage { content, host }) => {
            let command = ImageCommand::Uploaded { id: image.id.clone(), content, host, upload };
            ctx.propose(Command::Image(command)).await?;
            Ok(())
        }
        Err(error) => {
            give_up(ctx, &image.id, upload).await;
            Err(error.into())
        }
    }
}

async fn give_up(ctx: &Context, id: &ImageId, upload: Option<u64>) {
    let command = match upload {
        Some(upload) => ImageCommand::UploadEnded { id: id.clone(), upload },
        None => ImageCommand::UploadFailed(id.clone()),
    };
    if let Err(error) = ctx.propose(Command::Image(command)).await {
        tracing::warn!(
            request_id = %ctx.edge.request_id, image_id = %id, error = error.message,
            "the image stays in saving until the leader gives the upload up"
        );
    }
}

async fn download(ctx: Context, Path(id): Path<String>) -> Result<Response, ApiError> {
    let image = find(&ctx, &id)?;
    let content = match (&image.content, image.status) {
        (Some(content), ImageStatus::Active) => content,
        (_, ImageStatus::Deactivated) if !ctx.is_admin() => {
            return Err(ApiError::forbidden("The requested image has been deactivated."));
        }
        (Some(content), ImageStatus::Deactivated) => content,
        _ => return Ok(StatusCode::NO_CONTENT.into_response()),
    };
    let stream = ctx.cloud().download_image(image).await?;
    let mut response = Response::new(Body::from_stream(stream));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(OCTETS));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(content.size_bytes));
    if let Ok(md5) = HeaderValue::from_str(&content.md5) {
        headers.insert("content-md5", md5);
    }
    Ok(response)
}
