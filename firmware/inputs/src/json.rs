//! Just enough JSON for instance metadata: a string member of the outermost object.

use alloc::string::String;

/// Deepest nesting that is walked over.
const DEPTH_MAX: usize = 64;

/// The string value of the outermost object's member `name`; `None` where it is absent, no
/// string, or the text before it is no JSON.
#[must_use]
pub fn string_member(text: &str, name: &str) -> Option<String> {
    let mut cursor = Cursor { bytes: text.as_bytes(), at: 0 };
    cursor.expect(b'{')?;
    if cursor.peek()? == b'}' {
        return None;
    }
    loop {
        let member = cursor.string()?;
        cursor.expect(b':')?;
        if member == name {
            return cursor.string();
        }
        cursor.skip_value()?;
        cursor.expect(b',')?;
    }
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn next(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    /// The next byte that is no blank, left in place.
    fn peek(&mut self) -> Option<u8> {
        while self.bytes.get(self.at)?.is_ascii_whitespace() {
            self.at += 1;
        }
        self.bytes.get(self.at).copied()
    }

    fn expect(&mut self, wanted: u8) -> Option<()> {
        if self.peek()? != wanted {
            return None;
        }
        self.at += 1;
        Some(())
    }

    fn string(&mut self) -> Option<String> {
        self.expect(b'"')?;
        let mut bytes = alloc::vec::Vec::new();
        loop {
            match self.next()? {
                b'"' => return String::from_utf8(bytes).ok(),
                b'\\' => {
                    let character = self.escape()?;
                    bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
                }
                byte => bytes.push(byte),
            }
        }
    }

    fn escape(&mut self) -> Option<char> {
        Some(match self.next()? {
            b'n' => '\n',
            b't' => '\t',
            b'r' => '\r',
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'u' => self.unicode_escape()?,
            byte @ (b'"' | b'\\' | b'/') => char::from(byte),
            _ => return None,
        })
    }

    fn unicode_escape(&mut self) -> Option<char> {
        let first = self.four_digits()?;
        if !(0xD800..0xDC00).contains(&first) {
            return char::from_u32(first);
        }
        if self.next()? != b'\\' || self.next()? != b'u' {
            return None;
        }
        let second = self.four_digits()?.checked_sub(0xDC00).filter(|low| *low < 0x400)?;
        char::from_u32(0x10000 + ((first - 0xD800) << 10) + second)
    }

    fn four_digits(&mut self) -> Option<u32> {
        (0..4).try_fold(0, |value, _| Some(value << 4 | char::from(self.next()?).to_digit(16)?))
    }

    /// Walks over one value without recursion: brackets are counted, strings are passed whole.
    fn skip_value(&mut self) -> Option<()> {
        let mut depth = 0usize;
        loop {
            match self.peek()? {
                b'"' => {
                    self.string()?;
                }
                b'{' | b'[' => {
                    depth += 1;
                    self.at += 1;
                    if depth > DEPTH_MAX {
                        return None;
                    }
                    continue;
                }
                b'}' | b']' => {
                    depth = depth.checked_sub(1)?;
                    self.at += 1;
                }
                b',' | b':' => {
                    self.at += 1;
                    continue;
                }
                _ => self.skip_scalar()?,
            }
            if depth == 0 {
                return Some(());
            }
        }
    }

    fn skip_scalar(&mut self) -> Option<()> {
        let start = self.at;
        while self
            .bytes
            .get(self.at)
            .is_some_and(|b| b.is_ascii_alphanumeric() || b"+-.".contains(b))
        {
            self.at += 1;
        }
        (self.at > start).then_some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    fn check(text: &str, name: &str, expected: Option<&str>) {
        assert_eq!(
            string_member(text, name),
            expected.map(ToString::to_string),
            "{name} of {text}"
        );
    }

    #[test]
    fn finds_only_the_outermost_objects_strings() {
        let text = r#" {"meta": {"uuid": "inner", "a": [1, {"b": "}"}]}, "keys": [], "n": -1.5e3, "t": true,
            "uuid" : "6a2f-1", "hostname": "web\u00e9\ud83d\ude00 \"1\"" }"#;
        check(text, "uuid", Some("6a2f-1"));
        check(text, "hostname", Some("webé😀 \"1\""));
        check(text, "b", None);
        check(text, "n", None);
        check("{}", "uuid", None);
    }

    #[test]
    fn broken_text_gives_nothing_and_ends() {
        for text in [
            "",
            "{",
            "[]",
            "{\"a\"",
            "{\"a\":",
            "{\"a\":}",
            "{\"a\":\"\\q\"}",
            "{\"a\":\"\\ud800\"}",
            "{\"x\":]",
        ] {
            check(text, "a", None);
        }
        check(&"{\"a\":[".repeat(10_000), "b", None);
        let whole = r#"{"x": [1, "two\u0041", {"y": null}], "a": "found"}"#;
        for end in 0..whole.len() - 2 {
            check(&whole[..end], "a", None);
        }
    }
}
