//! Microversions: what is declared, and what a request asked for.
//!
//! Whatever maximum is declared is a promise: raise it with the behaviour.

use std::fmt;

use http::{HeaderMap, HeaderName, HeaderValue};

use super::error::{ApiError, ErrorKind, Service};

/// A microversion, `major.minor`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Microversion(pub(crate) u16, pub(crate) u16);

impl fmt::Display for Microversion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// What a service declares.
#[derive(Debug)]
pub(crate) struct Range {
    /// Its word in `OpenStack-API-Version`.
    pub(crate) word: &'static str,
    pub(crate) min: Microversion,
    pub(crate) max: Microversion,
    /// The header of before there was a common one.
    legacy: Option<&'static str>,
}

/// Compute's range.
pub(crate) const COMPUTE: Range = Range {
    word: "compute",
    min: Microversion(2, 1),
    max: Microversion(2, 96),
    legacy: Some("x-openstack-nova-api-version"),
};

/// Block storage's range.
pub(crate) const VOLUME: Range =
    Range { word: "volume", min: Microversion(3, 0), max: Microversion(3, 0), legacy: None };

const HEADER: HeaderName = HeaderName::from_static("openstack-api-version");

/// The range of a service that has one.
pub(crate) fn range(service: Service) -> Option<&'static Range> {
    match service {
        Service::Compute => Some(&COMPUTE),
        Service::Volume => Some(&VOLUME),
        _ => None,
    }
}

impl Range {
    /// The microversion that a request with `headers` is to be served at.
    pub(crate) fn negotiate(&self, headers: &HeaderMap) -> Result<Microversion, ApiError> {
        match self.asked(headers).as_deref() {
            None => Ok(self.min),
            Some("latest") => Ok(self.max),
            Some(text) => self.parse(text),
        }
    }

    fn asked(&self, headers: &HeaderMap) -> Option<String> {
        headers
            .get_all(HEADER)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .filter_map(|one| one.trim().split_once(' '))
            .find(|(word, _)| word.eq_ignore_ascii_case(self.word))
            .map(|(_, version)| version.trim().to_owned())
            .or_else(|| {
                let value = headers.get(self.legacy?)?.to_str().ok()?;
                Some(value.trim().to_owned())
            })
    }

    fn parse(&self, text: &str) -> Result<Microversion, ApiError> {
        let number = |part: &str| {
            (part == "0" || !part.starts_with('0')).then(|| part.parse::<u16>().ok()).flatten()
        };
        let asked = text
            .split_once('.')
            .and_then(|(major, minor)| Some(Microversion(number(major)?, number(minor)?)))
            .ok_or_else(|| {
                ApiError::bad_request(format!(
                    "API Version String {text} is of invalid format. Must be of format \
                     MajorNum.MinorNum."
                ))
            })?;
        if asked < self.min || asked > self.max {
            return Err(ApiError::new(
                ErrorKind::NotAcceptable,
                format!(
                    "Version {asked} is not supported by the API. Minimum is {} and maximum is {}.",
                    self.min, self.max
                ),
            ));
        }
        Ok(asked)
    }

    /// Says in the answer which microversion it has.
    pub(crate) fn stamp(&self, served: Microversion, headers: &mut HeaderMap) {
        let mut put = |name: HeaderName, value: String| {
            if let Ok(value) = HeaderValue::from_str(&value) {
                headers.insert(name.clone(), value);
                headers.append(http::header::VARY, HeaderValue::from(name));
            }
        };
        put(HEADER, format!("{} {served}", self.word));
        if let Some(legacy) = self.legacy {
            put(HeaderName::from_static(legacy), served.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect()
    }

    #[test]
    fn understands_both_headers_and_latest() {
        let new = headers(&[("openstack-api-version", "volume 3.5, compute 2.47")]);
        assert_eq!(COMPUTE.negotiate(&new).ok(), Some(Microversion(2, 47)));
        let old = headers(&[("x-openstack-nova-api-version", "2.10")]);
        assert_eq!(COMPUTE.negotiate(&old).ok(), Some(Microversion(2, 10)));
        let latest = headers(&[("openstack-api-version", "compute latest")]);
        assert_eq!(COMPUTE.negotiate(&latest).ok(), Some(COMPUTE.max));
        assert_eq!(COMPUTE.negotiate(&HeaderMap::new()).ok(), Some(COMPUTE.min));
    }

    #[test]
    fn refuses_what_is_not_declared_and_what_is_no_version() {
        let kind = |value| {
            COMPUTE.negotiate(&headers(&[("openstack-api-version", value)])).err().map(|e| e.kind)
        };
        assert_eq!(kind("compute 2.999"), Some(ErrorKind::NotAcceptable));
        assert_eq!(kind("compute 1.0"), Some(ErrorKind::NotAcceptable));
        assert_eq!(kind("compute 2.01"), Some(ErrorKind::BadRequest));
        assert_eq!(kind("compute two"), Some(ErrorKind::BadRequest));
    }
}
