//! Glance's API v2: the image catalog and its bytes.

mod data;
mod images;
mod patch;
mod schema;
mod view;

use super::context::Context;
use super::error::ApiError;
use super::routes::Routes;
use crate::state::image::{Image, Visibility};

pub(super) const PREFIX: &str = "/image";

pub(super) fn routes() -> Routes {
    images::routes().and(data::routes()).and(schema::routes())
}

/// True when the caller may see the image if it knows the id.
fn sees(ctx: &Context, image: &Image) -> bool {
    matches!(image.visibility, Visibility::Public | Visibility::Community)
        || ctx.is_admin()
        || image.owner.as_ref().is_some_and(|owner| ctx.owns(owner))
}

/// The image, if the caller may see it.
pub(super) fn find<'a>(ctx: &'a Context, id: &str) -> Result<&'a Image, ApiError> {
    let image = ctx.state.image.images.get(id).map(AsRef::as_ref);
    image.filter(|image| sees(ctx, image)).ok_or_else(|| ApiError::not_found("image", id))
}

/// The image, if the caller may change it.
fn find_own<'a>(ctx: &'a Context, id: &str) -> Result<&'a Image, ApiError> {
    let image = find(ctx, id)?;
    let own = image.owner.as_ref().is_some_and(|owner| ctx.owns(owner));
    if own || ctx.is_admin() {
        return Ok(image);
    }
    Err(ApiError::forbidden("You are not permitted to modify this image."))
}
