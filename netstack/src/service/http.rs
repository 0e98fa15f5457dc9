//! As much of HTTP/1.1 (RFC 9112) as metadata clients speak: GET and HEAD without a body, answered
//! with a length. Pure: bytes in, bytes out.

use std::collections::BTreeMap;

/// Longest request head, bytes.
pub(super) const REQUEST_BYTES_MAX: usize = 8192;

/// What to do with the bytes received so far.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The request has not ended.
    More,
    /// Send this; `consumed` bytes of the input were the request.
    Answer { response: Vec<u8>, consumed: usize, close: bool },
}

/// Looks at what a client sent and answers a whole request from `files`.
pub(super) fn step(input: &[u8], files: &BTreeMap<String, String>) -> Step {
    let Some(end) = input.windows(4).position(|window| window == b"\r\n\r\n") else {
        if input.len() >= REQUEST_BYTES_MAX {
            return refuse(input.len(), "431 Request Header Fields Too Large");
        }
        return Step::More;
    };
    let consumed = end + 4;
    let Ok(head) = std::str::from_utf8(&input[..end]) else {
        return refuse(consumed, "400 Bad Request");
    };
    let Some(request) = Request::parse(head) else {
        return refuse(consumed, "400 Bad Request");
    };
    let head_only = match request.method {
        "GET" => false,
        "HEAD" => true,
        _ => return refuse(consumed, "405 Method Not Allowed"),
    };
    let close = request.close;
    let response = match lookup(files, request.path) {
        Some((body, kind)) => respond("200 OK", kind, &body, head_only, close),
        None => respond("404 Not Found", "text/plain", "404 Not Found\n", head_only, close),
    };
    Step::Answer { response, consumed, close }
}

struct Request<'a> {
    method: &'a str,
    path: &'a str,
    close: bool,
}

impl<'a> Request<'a> {
    fn parse(head: &'a str) -> Option<Request<'a>> {
        let mut lines = head.split("\r\n");
        let mut words = lines.next()?.split(' ');
        let (method, target, version) = (words.next()?, words.next()?, words.next()?);
        if words.next().is_some() || !version.starts_with("HTTP/1.") {
            return None;
        }
        let mut close = version == "HTTP/1.0";
        for line in lines {
            let (name, value) = line.split_once(':')?;
            let value = value.trim();
            if name.eq_ignore_ascii_case("connection") {
                close = value.eq_ignore_ascii_case("close")
                    || (close && !value.eq_ignore_ascii_case("keep-alive"));
            }
            let body = (name.eq_ignore_ascii_case("content-length") && value != "0")
                || name.eq_ignore_ascii_case("transfer-encoding");
            if body {
                return None;
            }
        }
        let target = target
            .strip_prefix("http://")
            .map_or(Some(target), |rest| rest.find('/').map(|slash| &rest[slash..]))?;
        let path = target.split(['?', '#']).next()?;
        path.starts_with('/').then_some(Request { method, path, close })
    }
}

fn refuse(consumed: usize, status: &str) -> Step {
    let response = respond(status, "text/plain", &format!("{status}\n"), false, true);
    Step::Answer { response, consumed, close: true }
}

fn respond(status: &str, kind: &str, body: &str, head_only: bool, close: bool) -> Vec<u8> {
    let connection = if close { "close" } else { "keep-alive" };
    let body_bytes = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {body_bytes}\r\n\
         Connection: {connection}\r\nServer: trine\r\n\r\n"
    );
    let mut response = head.into_bytes();
    if !head_only {
        response.extend_from_slice(body.as_bytes());
    }
    response
}

/// A file's body, or a directory's listing. Listings are as Nova's: names of EC2's directories end
/// in a slash, versions and OpenStack's do not.
fn lookup(files: &BTreeMap<String, String>, path: &str) -> Option<(String, &'static str)> {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let name = parts.join("/");
    if let Some(body) = files.get(&name) {
        let kind = if name.ends_with(".json") { "application/json" } else { "text/plain" };
        return Some((body.clone(), kind));
    }
    let prefix = if name.is_empty() { String::new() } else { format!("{name}/") };
    let slashes = !parts.is_empty() && parts[0] != "openstack";
    let mut entries: Vec<String> = Vec::new();
    for path in files.keys().filter_map(|path| path.strip_prefix(&prefix)) {
        let entry = match path.split_once('/') {
            Some((directory, _)) if slashes => format!("{directory}/"),
            Some((directory, _)) => directory.to_owned(),
            None => path.to_owned(),
        };
        if !entries.contains(&entry) {
            entries.push(entry);
        }
    }
    (!entries.is_empty() || parts.is_empty()).then(|| (entries.join("\n"), "text/plain"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files() -> BTreeMap<String, String> {
        [
            ("openstack/latest/meta_data.json", "{}"),
            ("openstack/latest/user_data", "#!/bin/sh"),
            ("latest/meta-data/instance-id", "i-1"),
            ("latest/meta-data/public-keys/0/openssh-key", "ssh-ed25519 AAAA"),
        ]
        .map(|(path, body)| (path.to_owned(), body.to_owned()))
        .into()
    }

    fn check(request: &str, status: &str, body: &str) {
        let Step::Answer { response, consumed, .. } = step(request.as_bytes(), &files()) else {
            panic!("{request:?} was not taken as a whole request");
        };
        assert_eq!(consumed, request.len());
        let response = String::from_utf8(response).unwrap();
        let (head, got) = response.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with(&format!("HTTP/1.1 {status}")), "{head}");
        assert_eq!(got, body);
    }

    #[test]
    fn files_and_directories_are_served() {
        let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n");
        check(&get("/openstack/latest/meta_data.json"), "200", "{}");
        check(&get("//openstack/latest//user_data?x=1"), "200", "#!/bin/sh");
        check(&get("/"), "200", "latest\nopenstack");
        check(&get("/openstack"), "200", "latest");
        check(&get("/openstack/latest/"), "200", "meta_data.json\nuser_data");
        check(&get("/latest/meta-data/"), "200", "instance-id\npublic-keys/");
        check(&get("/openstack/2099-01-01"), "404", "404 Not Found\n");
        check(&get("/openst"), "404", "404 Not Found\n");
        check(&get("http://169.254.169.254/openstack"), "200", "latest");
        check("HEAD /openstack HTTP/1.0\r\n\r\n", "200", "");
    }

    #[test]
    fn what_is_not_a_plain_read_is_refused() {
        check("PUT /latest/api/token HTTP/1.1\r\n\r\n", "405", "405 Method Not Allowed\n");
        check("GET /\r\n\r\n", "400", "400 Bad Request\n");
        check("GET / HTTP/1.1\r\nContent-Length: 5\r\n\r\n", "400", "400 Bad Request\n");
        check(&"x".repeat(REQUEST_BYTES_MAX), "431", "431 Request Header Fields Too Large\n");
        assert_eq!(step(b"GET / HTTP/1.1\r\n", &files()), Step::More);
    }

    #[test]
    fn a_pipelined_request_stays_in_the_input() {
        let one = "GET /openstack HTTP/1.1\r\n\r\n";
        let Step::Answer { consumed, close, .. } = step(one.repeat(2).as_bytes(), &files()) else {
            panic!("two requests were taken as none");
        };
        assert_eq!((consumed, close), (one.len(), false));
    }
}
