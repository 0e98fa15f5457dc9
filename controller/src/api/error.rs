//! One error for every handler, and the one place that renders it in each service's form.

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::header::CONTENT_TYPE;
use http::{HeaderValue, StatusCode};
use serde_json::{Value, json};

use super::cloud::{CloudError, ProposeError, Unavailable};
use crate::state::{Rejection, RejectionKind};

/// The services, each with its own habits of wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Service {
    Identity,
    Compute,
    Image,
    Volume,
    Network,
    /// What belongs to none of them: `/`, `/healthz`, unknown prefixes.
    Root,
}

impl Service {
    /// The service a path belongs to.
    pub(crate) fn of_path(path: &str) -> Self {
        match path.split('/').nth(1).unwrap_or_default() {
            "identity" => Self::Identity,
            "compute" => Self::Compute,
            "image" => Self::Image,
            "volume" => Self::Volume,
            "networking" => Self::Network,
            _ => Self::Root,
        }
    }
}

/// What went wrong, in kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ErrorKind {
    BadRequest,
    Unauthorized,
    Forbidden,
    NotFound,
    MethodNotAllowed,
    NotAcceptable,
    Conflict,
    /// The object's state forbids the act.
    InvalidState,
    /// Something else still uses the object.
    InUse,
    QuotaExceeded,
    AddressesExhausted,
    TooLarge,
    UnsupportedMediaType,
    NoSpace,
    /// The cluster itself has no room to write down any change.
    LogFull,
    Unavailable,
    Internal,
}

/// Why a request was not served.
#[derive(Clone, Debug)]
pub(crate) struct ApiError {
    pub(crate) kind: ErrorKind,
    pub(crate) message: String,
    /// What it is about, in snake case (`network`, `security_group`); Neutron names its
    /// errors by it.
    pub(crate) resource: Option<String>,
}

impl ApiError {
    /// An error of `kind`, told to the user as `message`.
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), resource: None }
    }

    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::BadRequest, message)
    }

    pub(crate) fn unauthorized() -> Self {
        Self::new(ErrorKind::Unauthorized, "The request you have made requires authentication.")
    }

    pub(crate) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Forbidden, message)
    }

    pub(crate) fn conflict(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Conflict, message)
    }

    /// The object `id` of kind `resource` (snake case) doesn't exist or isn't the caller's.
    pub(crate) fn not_found(resource: &str, id: &str) -> Self {
        let words = resource.replace('_', " ");
        let mut message = format!("{words} {id} could not be found.");
        if let Some(first) = message.get_mut(0..1) {
            first.make_ascii_uppercase();
        }
        Self { kind: ErrorKind::NotFound, message, resource: Some(resource.to_owned()) }
    }

    /// The same error about `resource`.
    pub(crate) fn about(mut self, resource: &str) -> Self {
        self.resource = Some(resource.to_owned());
        self
    }

    fn status(&self, service: Service) -> StatusCode {
        match self.kind {
            ErrorKind::BadRequest => StatusCode::BAD_REQUEST,
            ErrorKind::Unauthorized => StatusCode::UNAUTHORIZED,
            ErrorKind::Forbidden => StatusCode::FORBIDDEN,
            ErrorKind::NotFound => StatusCode::NOT_FOUND,
            ErrorKind::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            ErrorKind::NotAcceptable => StatusCode::NOT_ACCEPTABLE,
            ErrorKind::InvalidState | ErrorKind::InUse if service == Service::Volume => {
                StatusCode::BAD_REQUEST
            }
            ErrorKind::Conflict
            | ErrorKind::InvalidState
            | ErrorKind::InUse
            | ErrorKind::AddressesExhausted => StatusCode::CONFLICT,
            ErrorKind::QuotaExceeded => match service {
                Service::Volume | Service::Image => StatusCode::PAYLOAD_TOO_LARGE,
                Service::Network => StatusCode::CONFLICT,
                _ => StatusCode::FORBIDDEN,
            },
            ErrorKind::TooLarge | ErrorKind::NoSpace => StatusCode::PAYLOAD_TOO_LARGE,
            ErrorKind::UnsupportedMediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            ErrorKind::LogFull => StatusCode::INSUFFICIENT_STORAGE,
            ErrorKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            ErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The error as `service` tells it.
    pub(crate) fn render(&self, service: Service) -> Response {
        let status = self.status(service);
        // A missing or bad token is answered by what stands before every service.
        let body = match service {
            _ if status == StatusCode::UNAUTHORIZED => self.identity_body(status),
            Service::Identity | Service::Root => self.identity_body(status),
            Service::Compute | Service::Volume => self.compute_body(status),
            Service::Network => self.network_body(),
            Service::Image => json!({
                "code": format!("{} {}", status.as_u16(), reason(status)),
                "title": reason(status),
                "message": self.message,
            }),
        };
        let mut response = Response::new(Body::from(body.to_string()));
        *response.status_mut() = status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response
    }

    fn identity_body(&self, status: StatusCode) -> Value {
        json!({"error": {
            "code": status.as_u16(), "message": self.message, "title": reason(status),
        }})
    }

    fn compute_body(&self, status: StatusCode) -> Value {
        let name = match status.as_u16() {
            400 => "badRequest",
            403 => "forbidden",
            404 => "itemNotFound",
            405 => "badMethod",
            409 => "conflictingRequest",
            413 | 429 => "overLimit",
            415 => "badMediaType",
            503 => "serviceUnavailable",
            _ => "computeFault",
        };
        json!({name: {"code": status.as_u16(), "message": self.message}})
    }

    fn network_body(&self) -> Value {
        let resource = camel(self.resource.as_deref().unwrap_or_default());
        let kind = match self.kind {
            ErrorKind::NotFound if resource.is_empty() => "HTTPNotFound".to_owned(),
            ErrorKind::NotFound => format!("{resource}NotFound"),
            ErrorKind::InUse => format!("{resource}InUse"),
            ErrorKind::QuotaExceeded => "OverQuota".to_owned(),
            ErrorKind::AddressesExhausted => "IpAddressGenerationFailure".to_owned(),
            ErrorKind::Forbidden => "PolicyNotAuthorized".to_owned(),
            ErrorKind::BadRequest => "HTTPBadRequest".to_owned(),
            ErrorKind::LogFull => "HTTPInsufficientStorage".to_owned(),
            ErrorKind::Unavailable => "HTTPServiceUnavailable".to_owned(),
            ErrorKind::Internal => "HTTPInternalServerError".to_owned(),
            ErrorKind::MethodNotAllowed => "HTTPMethodNotAllowed".to_owned(),
            _ => "Conflict".to_owned(),
        };
        json!({"NeutronError": {"type": kind, "message": self.message, "detail": ""}})
    }
}

fn reason(status: StatusCode) -> &'static str {
    status.canonical_reason().unwrap_or("Error")
}

fn camel(snake: &str) -> String {
    snake
        .split('_')
        .flat_map(|word| {
            let mut letters = word.chars();
            letters.next().map(|c| c.to_ascii_uppercase()).into_iter().chain(letters)
        })
        .collect()
}

impl IntoResponse for ApiError {
    /// Only carries the error to the edge, which knows the service and renders it.
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = self.status(Service::Root);
        response.extensions_mut().insert(self);
        response
    }
}

impl From<Unavailable> for ApiError {
    fn from(error: Unavailable) -> Self {
        Self::new(ErrorKind::Unavailable, error.to_string())
    }
}

impl From<Rejection> for ApiError {
    fn from(rejection: Rejection) -> Self {
        let kind = match rejection.kind {
            RejectionKind::NotFound => ErrorKind::NotFound,
            RejectionKind::Conflict => ErrorKind::Conflict,
            RejectionKind::InvalidState => ErrorKind::InvalidState,
            RejectionKind::InUse => ErrorKind::InUse,
            RejectionKind::QuotaExceeded | RejectionKind::TooMany => ErrorKind::QuotaExceeded,
            RejectionKind::Invalid => ErrorKind::BadRequest,
            RejectionKind::Forbidden => ErrorKind::Forbidden,
            RejectionKind::AddressesExhausted => ErrorKind::AddressesExhausted,
            RejectionKind::PlacementStale => ErrorKind::Conflict,
        };
        Self { kind, message: rejection.message, resource: Some(rejection.resource) }
    }
}

impl From<ProposeError> for ApiError {
    fn from(error: ProposeError) -> Self {
        match error {
            ProposeError::Rejected(rejection) => rejection.into(),
            ProposeError::Unavailable(_) => Self::new(ErrorKind::Unavailable, error.to_string()),
            ProposeError::NoSpace(_) => Self::new(ErrorKind::LogFull, error.to_string()),
        }
    }
}

impl From<CloudError> for ApiError {
    fn from(error: CloudError) -> Self {
        let kind = match &error {
            CloudError::NotFound(_) => ErrorKind::NotFound,
            CloudError::Invalid(_) => ErrorKind::BadRequest,
            CloudError::NoSpace(_) => ErrorKind::NoSpace,
            CloudError::Conflict(_) => ErrorKind::Conflict,
            CloudError::Unavailable(_) => ErrorKind::Unavailable,
            CloudError::Failed(_) => ErrorKind::Internal,
        };
        Self::new(kind, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_disks_of_the_cluster_are_507_in_every_service() {
        let services = [
            Service::Identity,
            Service::Compute,
            Service::Image,
            Service::Volume,
            Service::Network,
        ];
        for service in services {
            let error = ApiError::from(ProposeError::NoSpace("node 1: 0 bytes free".into()));
            assert!(error.message.contains("free space") && error.message.contains("node 1"));
            assert_eq!(error.render(service).status(), 507, "{service:?}");
        }
    }
}
