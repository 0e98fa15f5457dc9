//! Nova's API v2.1.
use super::routes::Routes;
pub(super) fn routes() -> Routes {
    Routes::new("/compute")
}
