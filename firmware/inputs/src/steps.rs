//! The steps a guest is told by its user data (see the README for the language).

use crate::http::{Url, parse_ipv4};
use alloc::string::{String, ToString};
use alloc::vec::Vec;

/// First line of user data that is a list of steps.
pub const FIRST_LINE: &str = "#trine-steps";
/// Most steps of a list.
pub const STEPS_MAX: usize = 256;
/// Longest time of a step, seconds.
pub const SECONDS_MAX: u64 = 86_400;
/// Most bytes of one disk step.
pub const DISK_BYTES_MAX: u64 = 1 << 30;
/// Most echo requests of one ping.
pub const PING_COUNT_MAX: u16 = 1000;
/// Most bytes of one request of a disk load.
pub const LOAD_BYTES_MAX: u64 = 1 << 20;
/// Most requests of a disk load at once.
pub const LOAD_DEPTH_MAX: u64 = 64;
/// A disk shows this much of its serial number.
const SERIAL_BYTES: usize = 20;

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Prints a text.
    Print(String),
    /// Waits.
    Sleep {
        /// How long.
        micros: u64,
    },
    /// Sends ICMP echo requests until `count` came back.
    Ping {
        /// To whom.
        address: [u8; 4],
        /// Replies wanted.
        count: u16,
        /// At most this long.
        timeout_micros: u64,
    },
    /// Answers HTTP from now on.
    HttpServe {
        /// TCP port.
        port: u16,
        /// Body of each answer.
        text: String,
    },
    /// Fetches a URL until it answers.
    HttpGet {
        /// What.
        url: Url,
        /// What the body must contain.
        expect: Option<String>,
        /// At most this long.
        timeout_micros: u64,
    },
    /// Waits for a disk.
    DiskWait {
        /// Start of its serial number.
        serial: String,
        /// At most this long.
        timeout_micros: u64,
    },
    /// Writes a pattern and reads it back.
    DiskWrite(Pattern),
    /// Reads a pattern.
    DiskVerify(Pattern),
    /// Keeps a disk busy and counts.
    DiskLoad(DiskLoad),
    /// Waits until a disk was taken away.
    DiskGone {
        /// Start of its serial number.
        serial: String,
        /// At most this long.
        timeout_micros: u64,
    },
    /// Ends the guest.
    PowerOff,
}

/// What a disk holds from its first byte on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    /// Start of the disk's serial number.
    pub serial: String,
    /// The text, repeated.
    pub text: String,
    /// How many bytes, a multiple of 512.
    pub bytes: u64,
}

/// How a disk is kept busy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskLoad {
    /// Start of the disk's serial number.
    pub serial: String,
    /// Writes (otherwise reads).
    pub write: bool,
    /// Anywhere (otherwise from the start on).
    pub random: bool,
    /// Bytes of each request, a multiple of 512.
    pub bytes: u64,
    /// Requests at once.
    pub depth: u16,
    /// How long.
    pub micros: u64,
}

impl Pattern {
    /// The pattern's bytes from `offset` on.
    pub fn fill(&self, offset: u64, buffer: &mut [u8]) {
        let text = self.text.as_bytes();
        let start = (offset % text.len() as u64) as usize;
        let source = text[start..].iter().chain(text.iter().cycle());
        buffer.iter_mut().zip(source).for_each(|(to, from)| *to = *from);
    }

    /// Offset of the first byte that differs, where `buffer` was read at `offset`.
    #[must_use]
    pub fn first_difference(&self, offset: u64, buffer: &[u8]) -> Option<u64> {
        let text = self.text.as_bytes();
        let start = (offset % text.len() as u64) as usize;
        let source = text[start..].iter().chain(text.iter().cycle());
        buffer.iter().zip(source).position(|(a, b)| a != b).map(|at| offset + at as u64)
    }
}

impl Step {
    /// The step's word.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Step::Print(_) => "print",
            Step::Sleep { .. } => "sleep",
            Step::Ping { .. } => "ping",
            Step::HttpServe { .. } => "http-serve",
            Step::HttpGet { .. } => "http-get",
            Step::DiskWait { .. } => "disk-wait",
            Step::DiskWrite(_) => "disk-write",
            Step::DiskVerify(_) => "disk-verify",
            Step::DiskLoad(_) => "disk-load",
            Step::DiskGone { .. } => "disk-gone",
            Step::PowerOff => "poweroff",
        }
    }
}

/// A line that is no step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepError {
    /// Its number among the steps, from 1.
    pub number: usize,
    /// Its first word.
    pub name: String,
    /// What is wrong, naming the value and the rule.
    pub reason: String,
}

/// Is this user data a list of steps?
#[must_use]
pub fn is_step_list(user_data: &[u8]) -> bool {
    let first = user_data.split(|byte| *byte == b'\n').next().unwrap_or(&[]);
    first.trim_ascii_end() == FIRST_LINE.as_bytes()
}

/// Reads the whole list, so that a mistake in the last step shows before the first one runs.
pub fn parse(text: &str) -> Result<Vec<Step>, StepError> {
    let lines =
        text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let mut steps = Vec::new();
    for (n, line) in lines.enumerate() {
        let mut words = line.split_ascii_whitespace();
        let name = words.next().unwrap_or("");
        let error = |reason: String| StepError { number: n + 1, name: name.to_string(), reason };
        if n == STEPS_MAX {
            return Err(error(alloc::format!("a list has at most {STEPS_MAX} steps")));
        }
        steps.push(parse_step(name, words.collect()).map_err(error)?);
    }
    Ok(steps)
}

fn parse_step(name: &str, words: Vec<&str>) -> Result<Step, String> {
    let mut words = Words { words, next: 0 };
    let step = match name {
        "print" => return Ok(Step::Print(words.rest())),
        "sleep" => Step::Sleep { micros: seconds(words.required("SECONDS")?)? },
        "ping" => {
            let address = words.required("ADDRESS")?;
            Step::Ping {
                address: parse_ipv4(address)
                    .ok_or_else(|| alloc::format!("ADDRESS {address} is not an IPv4 address"))?,
                count: number(
                    "count",
                    words.option("count").unwrap_or("3"),
                    1,
                    u64::from(PING_COUNT_MAX),
                )? as u16,
                timeout_micros: words.timeout("10")?,
            }
        }
        "http-serve" => {
            let port = number("PORT", words.required("PORT")?, 1, 65535)? as u16;
            return Ok(Step::HttpServe { port, text: words.rest() });
        }
        "http-get" => Step::HttpGet {
            url: Url::parse(words.required("URL")?).map_err(ToString::to_string)?,
            expect: words.option("expect").map(ToString::to_string),
            timeout_micros: words.timeout("10")?,
        },
        "disk-wait" => {
            Step::DiskWait { serial: words.serial()?, timeout_micros: words.timeout("60")? }
        }
        "disk-write" => Step::DiskWrite(words.pattern()?),
        "disk-verify" => Step::DiskVerify(words.pattern()?),
        "disk-load" => Step::DiskLoad(words.load()?),
        "disk-gone" => {
            Step::DiskGone { serial: words.serial()?, timeout_micros: words.timeout("60")? }
        }
        "poweroff" => Step::PowerOff,
        _ => return Err("there is no such step".into()),
    };
    words.nothing_left()?;
    Ok(step)
}

/// A step's words: positional ones in order, options by name.
struct Words<'a> {
    words: Vec<&'a str>,
    next: usize,
}

impl<'a> Words<'a> {
    fn required(&mut self, what: &str) -> Result<&'a str, String> {
        let word = self
            .words
            .get(self.next)
            .copied()
            .ok_or_else(|| alloc::format!("{what} is missing"))?;
        self.next += 1;
        Ok(word)
    }

    fn option(&mut self, name: &str) -> Option<&'a str> {
        let found = self.words.iter().skip(self.next).position(|word| {
            word.split_once('=').is_some_and(|(candidate, _)| candidate == name)
        })?;
        let word = self.words.remove(self.next + found);
        word.split_once('=').map(|(_, value)| value)
    }

    fn rest(&self) -> String {
        self.words[self.next..].join(" ")
    }

    fn timeout(&mut self, default: &str) -> Result<u64, String> {
        seconds(self.option("timeout").unwrap_or(default))
    }

    fn serial(&mut self) -> Result<String, String> {
        let serial = self.required("SERIAL")?;
        // A disk shows 20 bytes; whoever gives a whole volume id means those.
        Ok(serial.chars().take(SERIAL_BYTES).collect())
    }

    fn pattern(&mut self) -> Result<Pattern, String> {
        let serial = self.serial()?;
        let text = self
            .option("pattern")
            .filter(|text| !text.is_empty())
            .ok_or("pattern=TEXT is missing")?;
        let bytes = self.option("bytes").ok_or("bytes=N is missing")?;
        let bytes = sectors_bytes(bytes, DISK_BYTES_MAX)?;
        Ok(Pattern { serial, text: text.to_string(), bytes })
    }

    fn load(&mut self) -> Result<DiskLoad, String> {
        let serial = self.serial()?;
        let write = choice("", self.required("read or write")?, ["read", "write"])?;
        let order = self.option("order").unwrap_or("random");
        let depth = self.option("depth").unwrap_or("1");
        let micros = seconds(self.option("seconds").unwrap_or("2"))?;
        Ok(DiskLoad {
            serial,
            write,
            random: choice("order=", order, ["sequential", "random"])?,
            bytes: sectors_bytes(self.option("bytes").unwrap_or("4096"), LOAD_BYTES_MAX)?,
            depth: number("depth", depth, 1, LOAD_DEPTH_MAX)? as u16,
            micros,
        })
    }

    fn nothing_left(&self) -> Result<(), String> {
        match self.words.get(self.next) {
            Some(word) => Err(alloc::format!("{word} is not understood")),
            None => Ok(()),
        }
    }
}

fn number(name: &str, text: &str, least: u64, most: u64) -> Result<u64, String> {
    let number = text.parse().ok().filter(|number| (least..=most).contains(number));
    number.ok_or_else(|| alloc::format!("{name} {text} is not a number from {least} to {most}"))
}

/// A number of bytes that is whole sectors.
fn sectors_bytes(text: &str, most: u64) -> Result<u64, String> {
    let bytes = number("bytes", text, 512, most)?;
    if !bytes.is_multiple_of(512) {
        return Err(alloc::format!("bytes={bytes} is not a multiple of 512"));
    }
    Ok(bytes)
}

/// Is it the second of two words?
fn choice(name: &str, text: &str, [first, second]: [&str; 2]) -> Result<bool, String> {
    match text {
        _ if text == first => Ok(false),
        _ if text == second => Ok(true),
        _ => Err(alloc::format!("{name}{text} is neither {first} nor {second}")),
    }
}

/// Whole or decimal seconds, as microseconds.
fn seconds(text: &str) -> Result<u64, String> {
    let parse = || {
        let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
        if fraction.is_empty()
            || fraction.len() > 6
            || !fraction.bytes().all(|byte| byte.is_ascii_digit())
        {
            return None;
        }
        let whole: u64 = whole.parse().ok().filter(|whole| *whole <= SECONDS_MAX)?;
        let scale = 10u64.pow(6 - fraction.len() as u32);
        Some(whole * 1_000_000 + fraction.parse::<u64>().ok()? * scale)
    };
    parse().ok_or_else(|| alloc::format!("{text} is not a number of seconds up to {SECONDS_MAX}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(line: &str, expected: Step) {
        assert_eq!(parse(line), Ok(alloc::vec![expected]), "{line}");
    }

    fn check_error(line: &str, reason: &str) {
        let error = parse(line).unwrap_err();
        assert!(error.reason.contains(reason), "{line}: {}", error.reason);
    }

    #[test]
    fn every_step_is_read_with_its_defaults() {
        check("print  hello   world ", Step::Print("hello world".into()));
        check("sleep 1.5", Step::Sleep { micros: 1_500_000 });
        check(
            "ping 10.0.0.5",
            Step::Ping { address: [10, 0, 0, 5], count: 3, timeout_micros: 10_000_000 },
        );
        check(
            "ping 10.0.0.5 timeout=2 count=1",
            Step::Ping { address: [10, 0, 0, 5], count: 1, timeout_micros: 2_000_000 },
        );
        check(
            "http-serve 80 hello from a=b",
            Step::HttpServe { port: 80, text: "hello from a=b".into() },
        );
        check(
            "http-get http://10.0.0.5/x expect=hello",
            Step::HttpGet {
                url: Url::parse("http://10.0.0.5/x").unwrap(),
                expect: Some("hello".into()),
                timeout_micros: 10_000_000,
            },
        );
        check(
            "disk-wait vol-1",
            Step::DiskWait { serial: "vol-1".into(), timeout_micros: 60_000_000 },
        );
        check(
            "disk-gone vol-1 timeout=5",
            Step::DiskGone { serial: "vol-1".into(), timeout_micros: 5_000_000 },
        );
        let pattern = Pattern { serial: "vol-1".into(), text: "abc".into(), bytes: 1024 };
        check("disk-write vol-1 pattern=abc bytes=1024", Step::DiskWrite(pattern.clone()));
        check("disk-verify vol-1 bytes=1024 pattern=abc", Step::DiskVerify(pattern));
        let load = DiskLoad {
            serial: "vol-1".into(),
            write: false,
            random: true,
            bytes: 4096,
            depth: 1,
            micros: 2_000_000,
        };
        check("disk-load vol-1 read", Step::DiskLoad(load.clone()));
        check(
            "disk-load vol-1 write order=sequential bytes=1048576 depth=32 seconds=0.5",
            Step::DiskLoad(DiskLoad {
                write: true,
                random: false,
                bytes: 1 << 20,
                depth: 32,
                micros: 500_000,
                ..load
            }),
        );
        check("poweroff", Step::PowerOff);
    }

    #[test]
    fn a_whole_volume_id_means_what_the_disk_shows_of_it() {
        let Step::DiskWait { serial, .. } =
            parse("disk-wait 01234567-89ab-cdef-0123-456789abcdef").unwrap().remove(0)
        else {
            panic!("another step");
        };
        assert_eq!(serial, "01234567-89ab-cdef-0");
    }

    #[test]
    fn mistakes_name_the_value_and_the_rule() {
        check_error("ping", "ADDRESS is missing");
        check_error("ping host", "host is not an IPv4 address");
        check_error("ping 1.2.3.4 count=0", "count 0 is not a number from 1 to 1000");
        check_error("ping 1.2.3.4 5", "5 is not understood");
        check_error("sleep -1", "-1 is not a number of seconds");
        check_error("sleep 1.", "1. is not a number of seconds");
        check_error("disk-write v pattern=a bytes=513", "bytes=513 is not a multiple of 512");
        check_error("disk-write v pattern= bytes=512", "pattern=TEXT is missing");
        check_error(
            "disk-write v pattern=a bytes=99999999999",
            "bytes 99999999999 is not a number",
        );
        check_error("disk-load v", "read or write is missing");
        check_error("disk-load v erase", "erase is neither read nor write");
        check_error("disk-load v read order=odd", "order=odd is neither sequential nor random");
        check_error("disk-load v read depth=65", "depth 65 is not a number from 1 to 64");
        check_error("disk-load v read bytes=1000", "bytes=1000 is not a multiple of 512");
        check_error("reboot", "there is no such step");
        let error = parse("#trine-steps\n\n# first\nprint a\nsleep x\n").unwrap_err();
        assert_eq!((error.number, error.name.as_str()), (2, "sleep"));
        check_error(&"print x\n".repeat(STEPS_MAX + 1), "at most 256 steps");
    }

    #[test]
    fn the_first_line_decides_what_user_data_is() {
        assert!(is_step_list(b"#trine-steps\r\nprint a"));
        assert!(is_step_list(b"#trine-steps"));
        assert!(!is_step_list(b"#trine-steps-2\nprint a"));
        assert!(!is_step_list(b"#cloud-config\n#trine-steps"));
        assert!(!is_step_list(b""));
    }

    #[test]
    fn a_pattern_continues_across_requests() {
        let pattern = Pattern { serial: String::new(), text: "abcde".into(), bytes: 0 };
        let mut whole = [0; 64];
        pattern.fill(0, &mut whole);
        assert_eq!(&whole[..12], b"abcdeabcdeab");
        let mut part = [0; 32];
        pattern.fill(32, &mut part);
        assert_eq!(part, whole[32..]);
        assert_eq!(pattern.first_difference(32, &part), None);
        part[7] ^= 1;
        assert_eq!(pattern.first_difference(32, &part), Some(39));
    }
}
