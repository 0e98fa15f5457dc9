//! HTTP/1: the little that a client and a server of short texts need, and `http` URLs.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

/// Longest head (start line and headers) taken, bytes.
pub const HEAD_BYTES_MAX: usize = 8 << 10;
/// Longest body taken, bytes.
pub const BODY_BYTES_MAX: usize = 256 << 10;

/// An `http` URL with an IPv4 address: the guest has no resolver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {
    /// Server address.
    pub address: [u8; 4],
    /// Server port.
    pub port: u16,
    /// Path and query, from the slash on.
    pub path: String,
}

impl Url {
    /// Reads `http://ADDRESS[:PORT][/PATH]`; the error says what is wrong.
    pub fn parse(text: &str) -> Result<Url, &'static str> {
        let rest = text.strip_prefix("http://").ok_or("a URL starts with http://")?;
        let (authority, path) = match rest.find('/') {
            Some(slash) => (&rest[..slash], &rest[slash..]),
            None => (rest, "/"),
        };
        let (host, port) = match authority.split_once(':') {
            Some((host, port)) => (
                host,
                port.parse()
                    .ok()
                    .filter(|p| *p != 0)
                    .ok_or("the port is a number from 1 to 65535")?,
            ),
            None => (authority, 80),
        };
        let address = parse_ipv4(host).ok_or("the host is an IPv4 address")?;
        if !path.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("the path has only visible ASCII characters");
        }
        Ok(Url { address, port, path: path.into() })
    }

    /// The request for it. HTTP/1.0, so that the answer's body ends where the connection does.
    #[must_use]
    pub fn request(&self) -> String {
        let [a, b, c, d] = self.address;
        let mut text = alloc::format!("GET {} HTTP/1.0\r\nHost: {a}.{b}.{c}.{d}", self.path);
        if self.port != 80 {
            text.push_str(&alloc::format!(":{}", self.port));
        }
        text.push_str("\r\nUser-Agent: trine-guest\r\nAccept: */*\r\nConnection: close\r\n\r\n");
        text
    }
}

impl fmt::Display for Url {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d] = self.address;
        write!(out, "http://{a}.{b}.{c}.{d}:{}{}", self.port, self.path)
    }
}

/// An address in dotted decimal.
#[must_use]
pub fn parse_ipv4(text: &str) -> Option<[u8; 4]> {
    Some(text.parse::<core::net::Ipv4Addr>().ok()?.octets())
}

/// What is wrong with an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseError {
    /// No HTTP status line and headers.
    Malformed,
    /// Longer than [`HEAD_BYTES_MAX`] or [`BODY_BYTES_MAX`].
    TooLong,
    /// The connection ended before the announced length.
    Cut,
}

impl fmt::Display for ResponseError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            ResponseError::Malformed => "the answer is not HTTP",
            ResponseError::TooLong => "the answer is too long",
            ResponseError::Cut => "the answer was cut short",
        })
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Body.
    pub body: Vec<u8>,
}

/// An answer as it arrives.
#[derive(Default)]
pub struct ResponseReader {
    bytes: Vec<u8>,
    head: Option<Head>,
}

#[derive(Clone, Copy)]
struct Head {
    status: u16,
    body_start: usize,
    body_len: Option<usize>,
}

impl ResponseReader {
    /// Takes received bytes; the answer once it is complete by its announced length.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Option<Response>, ResponseError> {
        if self.bytes.len() + bytes.len() > HEAD_BYTES_MAX + BODY_BYTES_MAX {
            return Err(ResponseError::TooLong);
        }
        self.bytes.extend_from_slice(bytes);
        if self.head.is_none() {
            self.head = read_head(&self.bytes)?;
        }
        match self.head {
            Some(Head { body_start, body_len: Some(len), .. })
                if self.bytes.len() >= body_start + len =>
            {
                self.take(Some(len)).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// The connection has ended: without an announced length that is the body's end.
    pub fn finish(&mut self) -> Result<Response, ResponseError> {
        match self.head {
            Some(Head { body_len: Some(_), .. }) => Err(ResponseError::Cut),
            Some(_) => self.take(None),
            None if self.bytes.is_empty() => Err(ResponseError::Cut),
            None => Err(ResponseError::Malformed),
        }
    }

    fn take(&mut self, len: Option<usize>) -> Result<Response, ResponseError> {
        let head = self.head.take().ok_or(ResponseError::Malformed)?;
        let mut body = core::mem::take(&mut self.bytes).split_off(head.body_start);
        body.truncate(len.unwrap_or(body.len()));
        Ok(Response { status: head.status, body })
    }
}

/// Where a head ends, after its empty line.
fn head_end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4)
}

fn read_head(bytes: &[u8]) -> Result<Option<Head>, ResponseError> {
    let Some(body_start) = head_end(bytes) else {
        return if bytes.len() > HEAD_BYTES_MAX { Err(ResponseError::TooLong) } else { Ok(None) };
    };
    let text = core::str::from_utf8(&bytes[..body_start]).map_err(|_| ResponseError::Malformed)?;
    let mut lines = text.lines();
    let mut words = lines.next().unwrap_or("").split(' ');
    if !words.next().is_some_and(|version| version.starts_with("HTTP/1.")) {
        return Err(ResponseError::Malformed);
    }
    let status = words.next().and_then(|word| word.parse().ok()).ok_or(ResponseError::Malformed)?;
    let mut body_len = None;
    for line in lines {
        let Some((name, value)) = line.split_once(':') else { continue };
        if name.eq_ignore_ascii_case("content-length") {
            body_len = Some(value.trim().parse().map_err(|_| ResponseError::Malformed)?);
        }
    }
    if body_len.is_some_and(|len| len > BODY_BYTES_MAX) {
        return Err(ResponseError::TooLong);
    }
    Ok(Some(Head { status, body_start, body_len }))
}

/// What a server makes of the bytes received so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// The head is not complete.
    Partial,
    /// A GET.
    Get,
    /// A HEAD.
    Head,
    /// Another method.
    Other,
    /// No HTTP, or a head over [`HEAD_BYTES_MAX`].
    Malformed,
}

/// Reads a request's head.
#[must_use]
pub fn read_request(bytes: &[u8]) -> Request {
    let Some(end) = head_end(bytes) else {
        return if bytes.len() > HEAD_BYTES_MAX { Request::Malformed } else { Request::Partial };
    };
    let Some(line) = core::str::from_utf8(&bytes[..end]).ok().and_then(|text| text.lines().next())
    else {
        return Request::Malformed;
    };
    let mut words = line.split(' ');
    match (words.next(), words.next(), words.next()) {
        (Some("GET"), Some(_), Some(version)) if version.starts_with("HTTP/1.") => Request::Get,
        (Some("HEAD"), Some(_), Some(version)) if version.starts_with("HTTP/1.") => Request::Head,
        (Some(_), Some(_), Some(version)) if version.starts_with("HTTP/1.") => Request::Other,
        _ => Request::Malformed,
    }
}

/// The answer to a request: the text, or a refusal. Empty for a partial one.
#[must_use]
pub fn answer(request: Request, text: &str) -> Vec<u8> {
    let (status, body) = match request {
        Request::Partial => return Vec::new(),
        Request::Get | Request::Head => ("200 OK", text),
        Request::Other => {
            ("405 Method Not Allowed\r\nAllow: GET, HEAD", "only GET is answered here\n")
        }
        Request::Malformed => ("400 Bad Request", "this is not HTTP/1\n"),
    };
    let mut bytes = alloc::format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    )
    .into_bytes();
    if request != Request::Head {
        bytes.extend_from_slice(body.as_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_an_ipv4_address() {
        let url = Url::parse("http://10.0.0.7:8080/a?b=c").unwrap();
        assert_eq!((url.address, url.port, url.path.as_str()), ([10, 0, 0, 7], 8080, "/a?b=c"));
        assert!(url.request().starts_with("GET /a?b=c HTTP/1.0\r\nHost: 10.0.0.7:8080\r\n"));
        assert_eq!(Url::parse("http://10.0.0.7").unwrap().path, "/");
        for wrong in [
            "https://10.0.0.7/",
            "http://host/",
            "http://10.0.0.7:0/",
            "http://10.0.0.7:x/",
            "http://1.2.3/",
            "http://1.2.3.4/\n",
        ] {
            assert!(Url::parse(wrong).is_err(), "{wrong}");
        }
    }

    fn read(parts: &[&[u8]]) -> Result<Response, ResponseError> {
        let mut reader = ResponseReader::default();
        for part in parts {
            if let Some(response) = reader.push(part)? {
                return Ok(response);
            }
        }
        reader.finish()
    }

    #[test]
    fn an_answer_ends_at_its_length_or_with_the_connection() {
        let whole = b"HTTP/1.1 200 OK\r\ncontent-LENGTH: 5\r\n\r\nhello";
        let expected = Response { status: 200, body: b"hello".to_vec() };
        for cut in 0..whole.len() {
            assert_eq!(read(&[&whole[..cut], &whole[cut..]]), Ok(expected.clone()));
            assert_eq!(read(&[&whole[..cut]]).is_err(), cut < whole.len());
        }
        assert_eq!(
            read(&[b"HTTP/1.0 404 Not Found\r\n\r\n", b"no"]),
            Ok(Response { status: 404, body: b"no".to_vec() })
        );
    }

    #[test]
    fn hostile_answers_are_errors() {
        assert_eq!(read(&[b"SSH-2.0-x\r\n\r\n"]), Err(ResponseError::Malformed));
        assert_eq!(
            read(&[b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"]),
            Err(ResponseError::Malformed)
        );
        assert_eq!(
            read(&[b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n"]),
            Err(ResponseError::TooLong)
        );
        assert_eq!(read(&[&[b'x'; HEAD_BYTES_MAX + 1]]), Err(ResponseError::TooLong));
        assert_eq!(read(&[]), Err(ResponseError::Cut));
    }

    #[test]
    fn a_server_answers_each_kind_of_request() {
        assert_eq!(read_request(b"GET / HTTP/1.1\r\nHost: x\r\n"), Request::Partial);
        assert_eq!(read_request(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"), Request::Get);
        assert_eq!(read_request(b"POST / HTTP/1.1\r\n\r\n"), Request::Other);
        assert_eq!(read_request(b"\xff\xfe\r\n\r\n"), Request::Malformed);
        assert_eq!(read_request(&[b'x'; HEAD_BYTES_MAX + 1]), Request::Malformed);
        assert!(
            answer(Request::Get, "hi")
                .ends_with(b"Content-Length: 2\r\nConnection: close\r\n\r\nhi")
        );
        assert!(answer(Request::Head, "hi").ends_with(b"\r\n\r\n"));
        assert!(answer(Request::Partial, "hi").is_empty());
    }
}
