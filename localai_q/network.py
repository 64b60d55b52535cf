"""How a node reaches what a source names: HTTP within limits. Owns redirects, proxies, and which addresses are refused.

A source is somebody's word, and may lead to what only this machine can reach. So the address that is connected to is
the one that was checked, at every hop.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx
import psutil

from localai_q.errors import InvalidValue, Unavailable

REDIRECTS = 10
TIMEOUT = httpx.Timeout(60.0, connect=15.0)
HEADERS_WITHIN = 60.0  # seconds from a connection to the end of an answer's headers
LARGEST_ANSWER = 4 << 20  # bytes of anything that is read as a whole,
ANSWER_WITHIN = 60.0  # and seconds for them
NAT64 = ipaddress.ip_network("64:ff9b::/96")
UNICAST = ipaddress.ip_network("2000::/3")  # all of IPv6 that is given to anybody
# Public by their numbers; behind them are protocols' own uses, and services for machines of one cloud.
SPECIAL = (ipaddress.ip_network("192.0.0.0/24"), ipaddress.ip_network("168.63.129.16/32"))
ANY = "*"
NO_HEADERS: Mapping[str, str] = MappingProxyType({})

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What a URL is allowed because of where it is from."""

    origins: frozenset[str] = frozenset()  # scheme://host:port that may be at any address, for a setting names them
    direct: bool = False  # without the proxy of the environment, which is for the world outside the cluster


NONE = Trust()
OF_THIS_MACHINE = Trust(origins=frozenset({ANY}))  # the URL is from this machine's own settings


def trust_in(url: str) -> Trust:
    """Trust in the origin of a URL that a setting names."""
    return Trust(origins=frozenset({_origin(httpx.URL(url))}))


class Network:
    """HTTP as a source may use it."""

    def __init__(
        self, *, allow_private: bool, cluster_urls: tuple[str, ...] = (), certificates: str | None = None
    ) -> None:
        self._allow_private = allow_private
        self._cluster_urls = cluster_urls
        self._tls = ssl.create_default_context(cafile=certificates)
        transport = _Guarded(self)
        self._client = httpx.Client(transport=transport, timeout=TIMEOUT, trust_env=False)

    @contextmanager
    def open(
        self, url: str, headers: Mapping[str, str] = NO_HEADERS, trust: Trust = NONE, *, method: str = "GET",
        until: str = "",
    ) -> Iterator[httpx.Response]:  # fmt: skip
        """A response whose body is not read yet, behind all redirects.

        With `until`, the name of a header, it is the first one that has it, or that leads to another server.

        Raises:
            InvalidValue: it leads to where sources may not lead.
            Unavailable: there are too many redirects.
            httpx.HTTPError: the network failed.
        """
        headers = {"Accept-Encoding": "identity", **headers}
        try:
            request = self._client.build_request(method, url, headers=headers, extensions={"trust": trust})
        except httpx.InvalidURL as error:
            raise InvalidValue(f"{error}") from error
        response = self._follow(request, until=until)
        try:
            yield response
        finally:
            response.close()

    def read(
        self, url: str, headers: Mapping[str, str] = NO_HEADERS, trust: Trust = NONE, **how: Any
    ) -> tuple[httpx.Response, bytes]:
        """A response and its body, which must be short. `how`: as for `open`."""
        with self.open(url, headers, trust, **how) as response:
            body, until = bytearray(), time.monotonic() + ANSWER_WITHIN
            for block in response.iter_raw():
                body += block
                if len(body) > LARGEST_ANSWER:
                    raise Unavailable(f"{response.url.host} answers with more than {LARGEST_ANSWER >> 20} MiB")
                if time.monotonic() > until:
                    raise Unavailable(f"{response.url.host} has not answered in full within {ANSWER_WITHIN:.0f} s")
            return response, bytes(body)

    def transport(self, url: httpx.URL, *, direct: bool) -> tuple[httpx.HTTPTransport, bool]:
        """What carries a request for the URL, and whether that is a proxy."""
        proxy = None if direct or proxy_bypass(url.host) else getproxies().get(url.scheme)
        # A connection serves one request: its TLS was checked for one name, and others may have the same address.
        limits = httpx.Limits(max_keepalive_connections=0)
        return httpx.HTTPTransport(verify=self._tls, proxy=proxy, limits=limits), proxy is not None

    def addresses(self, url: httpx.URL, trust: Trust) -> list[str]:
        """The addresses of the URL's host, all of which may be connected to.

        Raises:
            InvalidValue: one of them may not.
        """
        try:
            found = socket.getaddrinfo(url.host, url.port or 0, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpx.ConnectError(f"{url.host} cannot be resolved: {error}") from error
        addresses = list(dict.fromkeys(str(info[4][0]).partition("%")[0] for info in found))
        if not (self._allow_private or {ANY, _origin(url)} & trust.origins):
            for address in addresses:
                self._check(url.host, ipaddress.ip_address(address))
        return addresses

    def _check(self, host: str, address: _Address) -> None:
        inner = _embedded(address)
        if inner in self._of_the_cluster or address in self._of_the_cluster:
            what = "an address of this cluster"
        elif not (_is_public(address) and _is_public(inner)):
            what = "no address of the public internet"
        else:
            return
        raise InvalidValue(
            f"{host} is {address}, {what}; LOCALAI_Q_ALLOW_PRIVATE_SOURCES=true allows that, on the node, or for galleries on the API",
            param="source",
        )

    @cached_property
    def _of_the_cluster(self) -> frozenset[_Address]:
        """Addresses of this machine, and of the servers that it was told of."""
        own = {one.address.partition("%")[0] for each in psutil.net_if_addrs().values() for one in each
               if one.family in (socket.AF_INET, socket.AF_INET6)}  # fmt: skip
        for url in self._cluster_urls:
            try:
                own |= {str(info[4][0]) for info in socket.getaddrinfo(urlsplit(url).hostname, None)}
            except (OSError, UnicodeError):
                continue  # what does not resolve cannot be connected to either
        return frozenset(ipaddress.ip_address(address.partition("%")[0]) for address in own)

    def _follow(self, request: httpx.Request, *, until: str) -> httpx.Response:
        for _ in range(REDIRECTS + 1):
            response = self._client.send(request, stream=True)
            onward = response.next_request
            if onward is None or (until and (until in response.headers or _origin(onward.url) != _origin(request.url))):
                return response
            response.close()
            if (request.url.scheme, onward.url.scheme) not in (("http", "http"), ("http", "https"), ("https", "https")):
                raise InvalidValue(
                    f"{request.url.host} redirects from {request.url.scheme} to {onward.url.scheme}, which is refused",
                    param="source",
                )
            request = onward
        raise Unavailable(f"{request.url.host} redirects more than {REDIRECTS} times")


class _Guarded(httpx.BaseTransport):
    """Connects to addresses that were checked, instead of to names that may mean something else the next time."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        trust: Trust = request.extensions.get("trust", NONE)
        carrier, proxied = self._network.transport(request.url, direct=trust.direct)
        if proxied:
            return self._by_proxy(carrier, request, trust)
        failure: httpx.HTTPError = httpx.ConnectError(f"{request.url.host} has no address")
        for address in self._network.addresses(request.url, trust):
            try:
                return _in_time(carrier, _to(address, request))
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
        raise failure

    def _by_proxy(self, carrier: httpx.HTTPTransport, request: httpx.Request, trust: Trust) -> httpx.Response:
        """The proxy resolves names by itself: here it is checked what can be, the rest is in its rules."""
        with suppress(httpx.ConnectError):  # a name that only the proxy knows
            self._network.addresses(request.url, trust)
        return _in_time(carrier, request)


def _in_time(carrier: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
    """Send the request, and cut its connection if the headers of the answer do not come in time.

    A timeout of httpx begins anew with each byte.
    """
    streams: list[Any] = []

    def note(event: str, told: Mapping[str, Any]) -> None:
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            streams.append(told["return_value"])

    def cut() -> None:
        with suppress(OSError, IndexError):
            # By the plain socket's method: that of TLS takes away what the reader is reading from.
            socket.socket.shutdown(streams[-1].get_extra_info("socket"), socket.SHUT_RDWR)

    request.extensions["trace"] = note
    timer = threading.Timer(HEADERS_WITHIN, cut)
    timer.daemon = True
    timer.start()
    try:
        return carrier.handle_request(request)
    finally:
        timer.cancel()


def _to(address: str, request: httpx.Request) -> httpx.Request:
    """The same request to an address; its Host and the name of its certificate stay."""
    extensions = {**request.extensions, "sni_hostname": request.url.host}
    url = request.url.copy_with(host=address)
    return httpx.Request(request.method, url, headers=request.headers, stream=request.stream, extensions=extensions)


def _origin(url: httpx.URL) -> str:
    port = url.port or {"http": 80, "https": 443}.get(url.scheme, 0)
    return f"{url.scheme}://{url.host}:{port}"


def _is_public(address: _Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address) and address not in UNICAST:
        return address in NAT64
    return address.is_global and not address.is_multicast and not any(address in network for network in SPECIAL)


def _embedded(address: _Address) -> _Address:
    """The IPv4 address that an IPv6 one stands for, where it does."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo else None) or address
