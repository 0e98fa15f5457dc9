//! Routes with their policy: no route is registered without a row of the table, or
//! without saying that it is open to everybody.

use axum::Extension;
use axum::Router;
use axum::handler::Handler;
use axum::routing::{MethodFilter, on};
use std::sync::Arc;

use super::Api;
use super::policy::Action;

/// A route as tests walk it.
#[derive(Clone, Copy, Debug)]
pub struct RouteRow {
    /// The method.
    pub method: &'static str,
    /// The service's prefix.
    pub prefix: &'static str,
    /// The path after the prefix, with `{parameters}`.
    pub path: &'static str,
    /// Its policy row; `None` when it is open to everybody.
    pub action: Option<&'static Action>,
}

/// Routes under one prefix.
pub(crate) struct Routes {
    prefix: &'static str,
    router: Router<Arc<Api>>,
    rows: Vec<RouteRow>,
}

impl Routes {
    /// No routes yet, all to be under `prefix` (`/compute`).
    pub(crate) fn new(prefix: &'static str) -> Self {
        Self { prefix, router: Router::new(), rows: Vec::new() }
    }

    fn on<H, T>(
        mut self,
        (method, filter): (&'static str, MethodFilter),
        path: &'static str,
        action: Option<&'static Action>,
        handler: H,
    ) -> Self
    where
        H: Handler<T, Arc<Api>>,
        T: 'static,
    {
        let full = format!("{}{path}", self.prefix);
        let route = match action {
            Some(action) => on(filter, handler).route_layer(Extension(action)),
            None => on(filter, handler),
        };
        self.router = self.router.route(&full, route);
        self.rows.push(RouteRow { method, prefix: self.prefix, path, action });
        self
    }

    pub(crate) fn get<H, T>(self, path: &'static str, action: &'static Action, handler: H) -> Self
    where
        H: Handler<T, Arc<Api>>,
        T: 'static,
    {
        self.on(("GET", MethodFilter::GET), path, Some(action), handler)
    }

    pub(crate) fn post<H, T>(self, path: &'static str, action: &'static Action, handler: H) -> Self
    where
        H: Handler<T, Arc<Api>>,
        T: 'static,
    {
        self.on(("POST", MethodFilter::POST), path, Some(action), handler)
    }

    pub(crate) fn put<H, T>(self, path: &'static str, action: &'static Action, handler: H) -> Self
    where
        H: Handler<T, Arc<Api>>,
        T: 'static,
    {
        self.on(("PUT", MethodFilter::PUT), path, Some(action), handler)
    }

    pub(crate) fn patch<H, T>(self, path: &'static str, action: &'static Action, handler: H) -> Self
    where
        H: Handler<T, Arc<Api>>,
        T: 'static,
    {
        self.on(("PATCH", MethodFilter::PATCH), path, Some(action), handler)
    }

    pub(crate) fn delete<H, T>(
        self,
        path: &'static str,
        action: &'static Action,
        handler: H,
    ) -> Self
    where
        H: Handler<T, Arc<Api>>,
        T: 'static,
    {
        self.on(("DELETE", MethodFilter::DELETE), path, Some(action), handler)
    }

    /// A GET that needs no token: discovery.
    pub(crate) fn open_get<H, T>(self, path: &'static str, handler: H) -> Self
    where
        H: Handler<T, Arc<Api>>,
        T: 'static,
    {
        self.on(("GET", MethodFilter::GET), path, None, handler)
    }

    /// A POST that needs no token: asking for one.
    pub(crate) fn open_post<H, T>(self, path: &'static str, handler: H) -> Self
    where
        H: Handler<T, Arc<Api>>,
        T: 'static,
    {
        self.on(("POST", MethodFilter::POST), path, None, handler)
    }

    /// These routes and those of `other`.
    pub(crate) fn and(mut self, other: Self) -> Self {
        self.router = self.router.merge(other.router);
        self.rows.extend(other.rows);
        self
    }

    /// The axum router and what is in it.
    pub(crate) fn into_parts(self) -> (Router<Arc<Api>>, Vec<RouteRow>) {
        (self.router, self.rows)
    }
}
