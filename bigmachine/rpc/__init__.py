"""Remote calls: the wire, specified. What is said here is what `connection`, `channel`, `client` and `server` do.

Transport
---------
TCP, then TLS 1.3 and nothing older, with certificates on both sides that the session's own CA has signed (`authority`), then
HTTP/2, negotiated by ALPN (``h2``). A peer without such a certificate, or without HTTP/2, is refused before a byte of any
request is looked at.

A machine has one port. Which of its processes is meant says the server name (SNI, which must be sent), and that name is what
the client verifies in the certificate; the host and port by which the machine was reached are not:

    supervisor.<machine id>.bigmachine     its supervisor, which serves ``Supervisor.…``
    <n>.<machine id>.bigmachine            its service process n, from 0, which serves the services and ``Process.…``

Services are called in process 0. Methods marked `parallel` can be called in any of the machine's ``maxprocs`` processes, where
any method of the services is parallel; elsewhere only process 0 has services. Who calls is said by the client's certificate
(`credentials`: a role and a name); it decides, before any argument is decoded, what the caller may do. Drivers may call
everything, machines everything but the methods of `Supervisor` that change a machine, others nothing.

An address, ``https://localhost:42409/m-7f3a9c/``, is where a machine listens and its id.

A call
------
    POST /bigrpc/<Service>.<method>

========================  ============================================================================================
request header
========================  ============================================================================================
``content-type``          ``application/x-bigmachine-pickle`` (also where there is none) or ``application/json``; anything
                          else is refused with 400
``bigm-layout``           the pickle form: decimal sizes in bytes, separated by commas: of the pickle, then of each buffer.
                          Without it the body is one pickle without buffers, of at most 64 MiB
``bigm-timeout``          seconds after which the caller gives up (decimal), counted from when the headers arrive; 0, or no
                          such header: never
``bigm-stream``           any value: what follows the parts that `bigm-layout` announces, up to the end of the request, are
                          the bytes of the call's one `Stream` argument. Only in the pickle form
``accept``                ``application/octet-stream``: a generator's items are sent as bytes. A request with a `bigm-layout`
                          that calls a generator must have this or ``application/x-bigmachine-items``, and only such a one
                          may have the latter: 400
========================  ============================================================================================

*Pickle form.* The body is the pickle (protocol 5) of ``(args, kwargs)``, a tuple and a dict, followed by its out-of-band
buffers, in their order. The response has the same form: ``content-type: application/x-bigmachine-pickle``, a `bigm-layout`, the
pickle of the result, its buffers. In place of a `Stream` argument the pickle holds the persistent id ``("stream", 0)``, and the
method gets a readable binary file; it is started as soon as the announced parts are there.

*JSON form.* An array is the positional arguments, an object the keyword arguments, an empty body none, and any other value the
only argument. (So a single argument that is a list goes in a list: ``[[1, 2]]``.) `bigm-layout` has no meaning here. The
response is ``content-type: application/json``, the result as JSON. A result without a JSON form (bytes, a set, an object) is a
``TypeError``, after the method has run.

*Items.* The response of a generator method, sync or async, is a stream of items, sent as they are yielded:

=============================================  =======================================================================
request                                        response
=============================================  =======================================================================
pickle form                                    ``application/x-bigmachine-items``: for each item ``>QB`` (size of the
                                               pickle, number of buffers), ``>Q`` for each buffer (its size), the pickle,
                                               the buffers
JSON form                                      ``application/x-ndjson``: each item as JSON, and a newline
``accept: application/octet-stream``           ``application/octet-stream``: the items, which must be bytes-like, one
                                               after another
=============================================  =======================================================================

The headers are sent with the first item, so that an exception before it still has a status of its own.

*Traces.* A call may say of which trace it is a part, as W3C's headers do (``traceparent``, ``tracestate``, ``baggage``): in the
JSON form by these headers; in the pickle form, and on the call channel, by a keyword argument named ``"\\0trace"``, a dict of
them, which the method does not get. Whoever has no use for it ignores it (`tracing`).

Outcome
-------
==========  ===========================================================================================================
``200``     the method returned, or its first item is here
``400``     it was not run: arguments that do not fit or cannot be decoded, a malformed header, a body shorter than its
            layout, a second call channel
``403``     it was not run: the caller's role may not
``404``     it was not run: no such service or method (the text says which there are), or path
``405``     not a ``POST``
``413``     it was not run: no memory for the announced arguments, or more than 64 MiB that were not announced
``503``     it was not run: the services are not set up yet
``590``     it raised, or what it returned cannot be encoded
==========  ===========================================================================================================

The body of a 4xx or 503 is the reason, as ``text/plain; charset=utf-8``, at most 8 KiB. It may come before the request is
complete; the rest of that is then turned away with ``RST_STREAM(NO_ERROR)``, unless it has a
``content-length``.

The body of a 590 is, in the pickle form, a failure (``application/x-bigmachine-failure``, specified in `failures`); in the JSON
form ``{"error": {"type": "ValueError", "message": "…"}}``. A generator that raises after its first item ends the response with
the trailer ``bigm-error``: the failure, in whichever form the call was, cut to 16 KiB and then in base64.

The call channel
----------------
A stream of its own costs a small call more than everything else together. So each connection may have one call channel:

    POST /bigrpc/
    content-type: application/x-bigmachine-calls

Its request and response stay open. Small calls are messages on it, many in flight, answered in the order in which they end. The
messages are specified in `channel`. They mean what the pickle form of a call means, with the same outcomes. Not for the channel
are arguments of more than 64 KiB or 255 buffers, `Stream` arguments, and generators. A reply above that is announced there
(``LARGE``) and collected with

    POST /bigrpc/-/reply
    bigm-call: <number of the call on this connection's channel>

once; its response is the pickle form's, but for ``content-type: application/octet-stream``. 404: there is no such reply (it was
collected, or the call was cancelled). The end of either direction of the channel ends the connection.

A method's name has at most 255 bytes there.

Cancellation, deadlines, the end
--------------------------------
The caller cancels with ``RST_STREAM`` (any code), on the channel with ``CANCEL``; the end of a connection cancels all its
calls. An ``async def`` method is then cancelled, a generator is closed at its next item, a plain method sees
``call_context().cancelled``, and reading a `Stream` argument raises OSError. No answer is sent.

A deadline runs at both ends, each by its own clock. The caller stops waiting, and cancels; a generator runs on until then. On
the far side `call_context` counts, and an ``async def`` method is cancelled shortly after, where the caller has not done it:
its answer is a ``TimeoutError``. A plain method that returns too late is answered for all the same.

``GOAWAY`` with code 0 announces the end: new calls need a new connection, streams above its last one did not run, others may
still be answered (where the call channel is one above, the connection is over). With another code, or at the end of TCP,
whatever was under way may or may not have run. ``RST_STREAM(REFUSED_STREAM)`` says that it did not.

Flow control and limits
-----------------------
A stream's window opens as the application consumes, so that a method that reads slowly slows its caller down, and a caller that
iterates slowly the generator. Exceptions: a body with a `bigm-layout` gets a window for all of it, as its memory is there; and
the connection's own window is as large as can be, so that one slow stream does not stall the others.

================================  ====================================================================================
a stream's first window           4 MiB, each direction
concurrent streams                256 a connection, which includes the call channel
DATA frame                        256 KiB; other frames, and header lists, 64 KiB
message on the call channel       128 KiB
buffers beside a pickle           255
TLS ClientHello, handshake        10 s each; the former 16 KiB
no progress in sending            60 s, then the connection is given up
================================  ====================================================================================

Whoever exceeds a limit of these loses the connection.

Another client
--------------
It needs the session's CA, a certificate of the session with its key, TLS 1.3, SNI and HTTP/2. The JSON form then makes ``curl``
a debugger, with the machine's id and port as in its address:

    curl --http2 --cacert ca.pem --cert cert.pem --key key.pem --connect-to ::localhost:42409 \\
         -H 'content-type: application/json' -d '[1000000]' https://0.m-7f3a9c.bigmachine/bigrpc/PI.sample

``b.credentials().write(folder)`` on the driver's session makes the three files.

A body with a ``content-length`` (``curl`` sends one) should come without a `bigm-layout`. Unpickling is execution, at both
ends: the parties of a session trust each other.
"""
