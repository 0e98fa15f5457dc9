//! What happens to every request before and after its handler: request id, microversion,
//! the base of URLs, and the form of errors.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::header::{HOST, WWW_AUTHENTICATE};
use http::uri::Authority;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use super::Api;
use super::error::{ApiError, ErrorKind, Service};
use super::microversion::{self, Microversion};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-openstack-request-id");
const COMPUTE_REQUEST_ID: HeaderName = HeaderName::from_static("x-compute-request-id");

/// What the edge found out about a request.
#[derive(Clone, Debug)]
pub(crate) struct Edge {
    pub(crate) request_id: String,
    /// `https://host:port` as the client reached it.
    pub(crate) base_url: String,
    /// The path, without the query.
    pub(crate) path: String,
    /// 0.0 for a service without microversions.
    pub(crate) microversion: Microversion,
}

/// The middleware around every route and fallback.
pub(crate) async fn edge(
    State(api): State<Arc<Api>>,
    mut request: Request,
    next: Next,
) -> Response {
    let service = Service::of_path(request.uri().path());
    let range = microversion::range(service);
    let negotiated = range.map(|range| range.negotiate(request.headers())).transpose();
    let microversion = negotiated.as_ref().ok().copied().flatten();
    let edge = Edge {
        request_id: format!("req-{}", uuid::Uuid::new_v4()),
        base_url: api.base_url(request.headers()),
        path: request.uri().path().to_owned(),
        microversion: microversion.unwrap_or(Microversion(0, 0)),
    };
    request.extensions_mut().insert(edge.clone());
    let method = request.method().clone();
    let mut response = match negotiated {
        Ok(_) => next.run(request).await,
        Err(error) => error.into_response(),
    };
    if let Some(error) = response.extensions_mut().remove::<ApiError>() {
        response = error.render(service);
    } else if is_frameworks_refusal(&response) {
        response = ApiError::bad_request("The request's path is not valid.").render(service);
    }
    tracing::debug!(
        request_id = %edge.request_id, %method, path = %edge.path,
        status = response.status().as_u16(), "request"
    );
    finish(&edge, service, &mut response);
    if let (Some(range), Some(served)) = (range, microversion) {
        range.stamp(served, response.headers_mut());
    }
    response
}

/// What axum's own extractors refuse is plain text: a path that is no UTF-8, as a rule.
fn is_frameworks_refusal(response: &Response) -> bool {
    let kind = response.headers().get(http::header::CONTENT_TYPE);
    let plain = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/plain"));
    response.status() == StatusCode::BAD_REQUEST && plain
}

fn finish(edge: &Edge, service: Service, response: &mut Response) {
    let unauthorized = response.status() == StatusCode::UNAUTHORIZED;
    let headers = response.headers_mut();
    if let Ok(id) = HeaderValue::from_str(&edge.request_id) {
        if service == Service::Compute {
            headers.insert(COMPUTE_REQUEST_ID, id.clone());
        }
        headers.insert(REQUEST_ID, id);
    }
    if unauthorized {
        let uri = format!("Keystone uri=\"{}/identity\"", edge.base_url);
        if let Ok(uri) = HeaderValue::from_str(&uri) {
            headers.insert(WWW_AUTHENTICATE, uri);
        }
    }
    headers.entry(http::header::VARY).or_insert(HeaderValue::from_static("X-Auth-Token"));
}

/// The answer to a path that no route has.
pub(crate) async fn unknown_path() -> ApiError {
    ApiError::new(ErrorKind::NotFound, "The resource could not be found.")
}

/// The answer to a method that a path doesn't have.
pub(crate) async fn unknown_method() -> ApiError {
    ApiError::new(
        ErrorKind::MethodNotAllowed,
        "The method specified is not allowed for this resource.",
    )
}

impl Api {
    /// The configured public URL, else the node that the client asked.
    fn base_url(&self, headers: &HeaderMap) -> String {
        if let Some(url) = &self.config.public_url {
            return url.trim_end_matches('/').to_owned();
        }
        let asked = headers
            .get(HOST)
            .and_then(|host| host.to_str().ok())
            .and_then(|host| host.parse::<Authority>().ok())
            .filter(|authority| !authority.as_str().contains('@'));
        match asked {
            Some(authority) => format!("https://{authority}"),
            None => format!("https://{}", self.config.listen),
        }
    }
}
