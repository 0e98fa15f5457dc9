//! The OpenStack REST APIs.
//!
//! A request passes `edge` (request id, microversion, form of errors), then its route's
//! policy row in `context` (linearizable read, token, role rule), then its handler. A
//! handler that changes something validates into a command, proposes it, and answers with
//! a view. Wire types stop here; one module per service, one file per resource.
//!
//! Find an endpoint by its path in the `routes()` of its service.

mod body;
mod cloud;
mod compute;
mod context;
mod discovery;
mod edge;
mod error;
mod identity;
mod image;
mod microversion;
mod network;
mod password;
mod policy;
mod query;
mod routes;
mod time;
mod token;
mod volume;

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;

pub use cloud::{
    BodyStream, Cloud, CloudError, ProposeError, SubState, TokenKeys, Unavailable, UploadedImage,
};
pub use password::{PasswordCost, PasswordError, hash_password};
pub use policy::{Action, Rule};
pub use routes::RouteRow;

use error::{ApiError, ErrorKind};
use password::Passwords;
use routes::Routes;

use crate::state::Outcome;

/// How long a token is good unless configured, seconds.
pub const TOKEN_LIFETIME_S: u64 = 3600;

/// What an operator decides of the API.
#[derive(Clone, Debug)]
pub struct ApiConfig {
    /// The base of every URL in answers; when absent, the node that the client asked.
    pub public_url: Option<String>,
    /// Where this node listens; the base of URLs for clients that name no host.
    pub listen: SocketAddr,
    /// How long a token is good, seconds.
    pub token_lifetime_s: u64,
    /// What hashing a password costs.
    pub password_cost: PasswordCost,
}

impl ApiConfig {
    /// The defaults of a node that listens at `listen`.
    pub fn new(listen: SocketAddr) -> Self {
        Self {
            public_url: None,
            listen,
            token_lifetime_s: TOKEN_LIFETIME_S,
            password_cost: PasswordCost::default(),
        }
    }
}

/// What all handlers share.
pub(crate) struct Api {
    pub(crate) cloud: Arc<dyn Cloud>,
    pub(crate) config: ApiConfig,
    pub(crate) passwords: Passwords,
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Api").field("config", &self.config).finish_non_exhaustive()
    }
}

/// An outcome that isn't of the kind that its command has: a bug, told as one.
fn unexpected(outcome: &Outcome) -> ApiError {
    tracing::error!(?outcome, "the outcome does not belong to its command");
    ApiError::new(ErrorKind::Internal, "The command had an unexpected outcome.")
}

fn routes() -> Routes {
    discovery::routes()
        .and(identity::routes())
        .and(image::routes())
        .and(compute::routes())
        .and(network::routes())
        .and(volume::routes())
}

/// Every route with its policy row, for documentation and for tests that walk them.
pub fn route_table() -> Vec<RouteRow> {
    routes().into_parts().1
}

/// The whole API as an axum router.
pub fn router(cloud: Arc<dyn Cloud>, config: ApiConfig) -> Router {
    let passwords = Passwords::new(config.password_cost);
    let api = Arc::new(Api { cloud, config, passwords });
    let (router, _) = routes().into_parts();
    router
        .fallback(edge::unknown_path)
        .method_not_allowed_fallback(edge::unknown_method)
        .layer(axum::middleware::from_fn_with_state(Arc::clone(&api), edge::edge))
        .with_state(api)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_policy_row_has_a_route() {
        let table = route_table();
        for action in policy::TABLE {
            let used = table.iter().any(|row| row.action == Some(action));
            assert!(used, "no route asks for {}", action.name);
        }
    }
}
