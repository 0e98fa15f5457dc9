//! Glance's API v2.
use super::routes::Routes;
pub(super) fn routes() -> Routes {
    Routes::new("/image")
}
