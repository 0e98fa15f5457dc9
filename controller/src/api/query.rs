//! Query strings: filters and pages.

use serde_json::{Value, json};

use super::error::ApiError;

/// The most elements one answer has, whatever the client asks for.
pub(crate) const PAGE_MAX: usize = 1000;

/// A query string's parameters, in order, repeated ones kept.
#[derive(Clone, Debug, Default)]
pub(crate) struct Params(Vec<(String, String)>);

impl Params {
    /// The parameters of a query string; what is no UTF-8 is refused.
    pub(crate) fn parse(query: &str) -> Result<Self, ApiError> {
        query
            .split('&')
            .filter(|pair| !pair.is_empty())
            .map(|pair| {
                let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
                Ok((percent_decode(name)?, percent_decode(value)?))
            })
            .collect::<Result<Vec<_>, ApiError>>()
            .map(Self)
    }

    /// The last value of a parameter.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// All values of a parameter.
    pub(crate) fn get_all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The names that are there.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }

    /// True when the parameter is there.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(key, _)| key == name)
    }

    /// A truth value in the forms that OpenStack's services take.
    pub(crate) fn bool(&self, name: &str) -> Result<Option<bool>, ApiError> {
        let Some(text) = self.get(name) else { return Ok(None) };
        match text.to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" | "on" | "t" | "y" | "" => Ok(Some(true)),
            "false" | "0" | "no" | "off" | "f" | "n" => Ok(Some(false)),
            "none" => Ok(None),
            _ => Err(ApiError::bad_request(format!(
                "Invalid input for query parameter {name}: {text:?} is not a boolean."
            ))),
        }
    }

    /// A number.
    pub(crate) fn u64(&self, name: &str) -> Result<Option<u64>, ApiError> {
        self.get(name)
            .map(|text| {
                text.parse().map_err(|_| {
                    ApiError::bad_request(format!(
                        "Invalid input for query parameter {name}: {text:?} is not a \
                         non-negative integer."
                    ))
                })
            })
            .transpose()
    }

    /// True when `value` passes the filter `name`: absent, equal to one of the given
    /// values, or in an `in:a,b` list.
    pub(crate) fn admits(&self, name: &str, value: &str) -> bool {
        let mut given = self.get_all(name).peekable();
        given.peek().is_none()
            || given.any(|one| match one.strip_prefix("in:") {
                Some(list) => list.split(',').any(|entry| entry.trim_matches('"') == value),
                None => one == value,
            })
    }

    /// The page that `limit` and `marker` ask for.
    pub(crate) fn page(&self) -> Result<Page, ApiError> {
        let limit = self.u64("limit")?.map(|limit| usize::try_from(limit).unwrap_or(PAGE_MAX));
        let marker = self.get("marker").filter(|marker| !marker.is_empty()).map(str::to_owned);
        Ok(Page { limit, marker })
    }

    /// The same query with another marker.
    fn with_marker(&self, marker: &str) -> String {
        self.0
            .iter()
            .filter(|(name, _)| name != "marker")
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .chain([("marker", marker)])
            .map(|(name, value)| format!("{}={}", percent_encode(name), percent_encode(value)))
            .collect::<Vec<_>>()
            .join("&")
    }
}

/// What part of a list is wanted.
#[derive(Clone, Debug, Default)]
pub(crate) struct Page {
    limit: Option<usize>,
    marker: Option<String>,
}

/// A part of a list.
pub(crate) struct Slice<T> {
    pub(crate) items: Vec<T>,
    /// The marker of the next part, if there is one.
    pub(crate) next: Option<String>,
}

impl Page {
    /// The wanted part of `items`, which are filtered and sorted.
    pub(crate) fn cut<T>(
        &self,
        items: Vec<T>,
        id: impl Fn(&T) -> &str,
    ) -> Result<Slice<T>, ApiError> {
        let start =
            match &self.marker {
                None => 0,
                Some(marker) => {
                    items.iter().position(|item| id(item) == marker).ok_or_else(|| {
                        ApiError::bad_request(format!("marker [{marker}] not found"))
                    })? + 1
                }
            };
        // A limit of 0 means none, as in Nova.
        let limit = match self.limit {
            None | Some(0) => PAGE_MAX,
            Some(limit) => limit.min(PAGE_MAX),
        };
        let more = items.len() > start.saturating_add(limit);
        let items: Vec<T> = items.into_iter().skip(start).take(limit).collect();
        let next = if more { items.last().map(|item| id(item).to_owned()) } else { None };
        Ok(Slice { items, next })
    }
}

impl<T> Slice<T> {
    /// `[{"rel": "next", "href": …}]`, or nothing on the last page. `url` is the list's,
    /// without a query.
    pub(crate) fn links(&self, url: &str, params: &Params) -> Option<Value> {
        let marker = self.next.as_deref()?;
        Some(json!([{"rel": "next", "href": format!("{url}?{}", params.with_marker(marker))}]))
    }
}

fn percent_decode(text: &str) -> Result<String, ApiError> {
    let bad = || ApiError::bad_request("The query string is not valid.");
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let mut digit = || char::from(rest.next()?).to_digit(16);
                let (high, low) = (digit().ok_or_else(bad)?, digit().ok_or_else(bad)?);
                u8::try_from(high * 16 + low).map_err(|_| bad())?
            }
            other => other,
        });
    }
    String::from_utf8(bytes).map_err(|_| bad())
}

/// Percent-encodes everything but RFC 3986's unreserved characters.
pub(crate) fn percent_encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                encoded.push(char::from(byte));
            }
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_queries_as_clients_write_them() {
        let params = Params::parse("name=a%20b+c&id=in%3Ax,y&flag&tags=1&tags=2").unwrap();
        assert_eq!(params.get("name"), Some("a b c"));
        assert!(params.admits("id", "y") && !params.admits("id", "z"));
        assert_eq!(params.bool("flag").ok(), Some(Some(true)));
        assert_eq!(params.get_all("tags").collect::<Vec<_>>(), ["1", "2"]);
        assert!(Params::parse("a=%f").is_err());
        assert!(Params::parse("a=%ff").is_err());
    }

    #[test]
    fn pages_follow_one_another_without_gap() {
        let items = || vec!["a", "b", "c", "d", "e"];
        let mut seen = Vec::new();
        let mut query = "limit=2&x=1".to_owned();
        loop {
            let params = Params::parse(&query).unwrap();
            let slice = params.page().unwrap().cut(items(), |item| item).unwrap();
            seen.extend(slice.items.iter().copied());
            let Some(links) = slice.links("/list", &params) else { break };
            let href = links[0]["href"].as_str().unwrap();
            query = href.strip_prefix("/list?").unwrap().to_owned();
        }
        assert_eq!(seen, items());
        assert!(query.contains("x=1"));
        let unknown = Params::parse("marker=zz").unwrap().page().unwrap();
        assert!(unknown.cut(items(), |item| item).is_err());
    }
}
