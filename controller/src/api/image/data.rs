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
use crate::state::Command;
use crate::state::image::{Image, ImageCommand, ImageStatus};

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
    ctx.propose(Command::Image(ImageCommand::UploadStarted(image.id.clone()))).await?;
    let body = request.into_body().into_data_stream();
    let body: BodyStream = Box::pin(body.map(|piece| piece.map_err(std::io::Error::other)));
    // A task of its own: when the client goes away this handler is dropped, but the image
    // must still return from `saving`.
    let finished = tokio::spawn(async move { store(&ctx, &image, body).await }).await;
    finished
        .unwrap_or_else(|_| Err(ApiError::new(ErrorKind::Internal, "The upload was ended.")))?;
    Ok(StatusCode::NO_CONTENT)
}

async fn store(ctx: &Context, image: &Image, body: BodyStream) -> Result<(), ApiError> {
    match ctx.cloud().upload_image(image, body).await {
        Ok(UploadedImage { content, host }) => {
            let command = ImageCommand::Uploaded { id: image.id.clone(), content, host };
            ctx.propose(Command::Image(command)).await?;
            Ok(())
        }
        Err(error) => {
            give_up(ctx, &image.id).await;
            Err(error.into())
        }
    }
}

async fn give_up(ctx: &Context, id: &ImageId) {
    let command = Command::Image(ImageCommand::UploadFailed(id.clone()));
    if let Err(error) = ctx.propose(command).await {
        tracing::warn!(
            request_id = %ctx.edge.request_id, image_id = %id, error = error.message,
            "the image stays in saving"
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
